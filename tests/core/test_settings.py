"""Ranges of settings: what they accept, and how messages name them."""

from dataclasses import dataclass
from typing import Annotated

import pytest

from ddpm_lab.core.config import DiffusionConfig, ModelConfig, SamplingConfig, TrainingConfig
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.settings import Range, SettingsGroup


@pytest.mark.parametrize(
    ("allowed", "words", "inside", "outside"),
    [
        (Range(1, 5), "from 1 to 5", (1, 3, 5), (0, 6)),
        (Range(0), "at least 0", (0, 10**9), (-1,)),
        (Range(0, open_low=True), "above 0", (1e-9,), (0, -1)),
        (Range(0, 1, open_high=True), "at least 0 and below 1", (0, 0.99), (1, -0.1)),
        (Range(0, 1, open_low=True), "above 0 and at most 1", (0.1, 1), (0, 1.1)),
    ],
)
def test_ranges(allowed, words, inside, outside):
    assert str(allowed) == words
    assert all(number in allowed for number in inside)
    assert not any(number in allowed for number in outside)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainingConfig(batch_size=0), "training.batch_size must be from 1 to 65536, not 0"),
        (lambda: TrainingConfig(ema_decay=1.0), "training.ema_decay must be at least 0 and below 1, not 1.0"),
        (lambda: DiffusionConfig(num_timesteps=1), "diffusion.num_timesteps must be from 2 to 10000, not 1"),
        (lambda: ModelConfig(channel_multipliers=(1, 0)), "model.channel_multipliers must be from 1 to 64, not 0"),
        (lambda: SamplingConfig(class_=(3, -1)), "class must be at least 0, not -1"),
        (lambda: TrainingConfig(batch_size=True), "training.batch_size must be a whole number, not True"),
        (lambda: SamplingConfig(eta="x"), "eta must be a finite number or nothing, not 'x'"),
    ],
)
def test_messages_name_the_setting_and_what_is_valid(make, message):
    with pytest.raises(InputError) as raised:
        make()
    assert str(raised.value) == message


def test_a_group_checks_what_its_fields_declare():
    @dataclass(frozen=True, kw_only=True)
    class PageConfig(SettingsGroup):
        width: Annotated[int | None, Range(1, 9)] = None

    assert PageConfig().width is None
    assert PageConfig.from_dict({"width": 9}).width == 9
    with pytest.raises(InputError, match=r"page\.width must be from 1 to 9, not 10"):
        PageConfig(width=10)
    with pytest.raises(InputError, match="page has no setting 'height'; it has width"):
        PageConfig.from_dict({"height": 1})
