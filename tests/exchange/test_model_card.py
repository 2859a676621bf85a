"""The model card says what any network predicts."""

import typing

from ddpm_lab.core.config import Prediction
from ddpm_lab.exchange.model_card import MEANING


def test_every_prediction_has_words():
    assert set(MEANING) == set(typing.get_args(Prediction))
