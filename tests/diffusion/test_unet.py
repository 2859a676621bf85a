"""The network against diffusers' of the same shape, its size, and what it refuses."""

import dataclasses

import pytest
import torch
from diffusers import UNet2DModel

from ddpm_lab.core.config import RECIPES, load_recipe
from ddpm_lab.core.errors import InputError
from ddpm_lab.diffusion.unet import UNet, attention, build_unet, timestep_embedding
from ddpm_lab.models.diffusers_format import diffusers_network


def copy_from_diffusers(ours: UNet, theirs: UNet2DModel) -> None:
    """Copy every weight of diffusers' network into ours; each must be used exactly once."""
    weights = dict(theirs.state_dict())

    def take(module, name, parts=("weight", "bias")):
        for part in parts:
            getattr(module, part).data.copy_(weights.pop(f"{name}.{part}"))

    def take_block(block, name):
        for mine, yours in (("norm1", "norm1"), ("conv1", "conv1"), ("embedding", "time_emb_proj"),
                            ("norm2", "norm2"), ("conv2", "conv2")):  # fmt: skip
            take(getattr(block, mine), f"{name}.{yours}")
        if not isinstance(block.shortcut, torch.nn.Identity):
            take(block.shortcut, f"{name}.conv_shortcut")

    def take_attention(attention, name):
        take(attention.norm, f"{name}.group_norm")
        for part in ("weight", "bias"):
            parts = [weights.pop(f"{name}.to_{letter}.{part}") for letter in "qkv"]
            getattr(attention.query_key_value, part).data.copy_(torch.cat(parts))
        take(attention.out, f"{name}.to_out.0")

    take(ours.conv_in, "conv_in")
    take(ours.time_embedding[0], "time_embedding.linear_1")
    take(ours.time_embedding[2], "time_embedding.linear_2")
    for side, kind in ((ours.down, "down"), (ours.up, "up")):
        for i, level in enumerate(side):
            for j, (block, attended) in enumerate(zip(level.blocks, level.attentions, strict=True)):
                take_block(block, f"{kind}_blocks.{i}.resnets.{j}")
                if not isinstance(attended, torch.nn.Identity):
                    take_attention(attended, f"{kind}_blocks.{i}.attentions.{j}")
            if level.resample is not None:
                take(level.resample.conv, f"{kind}_blocks.{i}.{kind}samplers.0.conv")
    take_block(ours.middle_in, "mid_block.resnets.0")
    take_attention(ours.middle_attention, "mid_block.attentions.0")
    take_block(ours.middle_out, "mid_block.resnets.1")
    take(ours.norm_out, "conv_norm_out")
    take(ours.conv_out, "conv_out")
    assert not weights, sorted(weights)


HO = {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6}


@pytest.mark.filterwarnings("ignore:model.norm_groups")
@pytest.mark.parametrize(
    ("channels", "size", "multipliers", "attention", "head", "conditioning", "T", "others"),
    [
        (1, 28, (1, 2, 2), (1,), None, "shift", 1000, HO),
        (3, 32, (1, 2), (0, 1), 8, "shift", 1000, HO),
        (1, 8, (1, 1), (), None, "shift", 1000, HO),
        (3, 16, (1, 2), (1,), 8, "scale_shift", 1000, HO),
        # the defaults of diffusers, but for norm_eps, of which 1e-5 would not show
        (3, 16, (1, 2), (0,), 8, "shift", 10_000, HO | {"downsample_padding": 1, "norm_eps": 0.1}),
        (3, 16, (1, 2), (0,), 8, "shift", 300, HO | {"flip_sin_to_cos": True, "freq_shift": 0}),
    ],
)
def test_same_outputs_as_diffusers(channels, size, multipliers, attention, head, conditioning, T, others):
    theirs = UNet2DModel(
        sample_size=size, in_channels=channels, out_channels=channels,
        block_out_channels=tuple(32 * m for m in multipliers), layers_per_block=2,
        down_block_types=tuple("AttnDownBlock2D" if i in attention else "DownBlock2D" for i in range(len(multipliers))),
        up_block_types=tuple("AttnUpBlock2D" if i in attention else "UpBlock2D" for i in range(len(multipliers)))[::-1],
        attention_head_dim=head, norm_num_groups=32, act_fn="silu", **others,
        resnet_time_scale_shift="default" if conditioning == "shift" else conditioning,
        attn_norm_num_groups=None if conditioning == "shift" else 32,  # else the middle attention has no normalisation
    ).eval()  # fmt: skip
    ours = UNet(
        channels, base_channels=32, channel_multipliers=multipliers, num_blocks=2, attention_levels=attention,
        attention_head_channels=head, time_conditioning=conditioning, num_timesteps=T, num_positions=T, **others,
    ).eval()  # fmt: skip
    copy_from_diffusers(ours, theirs)
    x_t, t = torch.randn(4, channels, size, size), torch.tensor([0, 17, T // 2, T - 1])
    with torch.no_grad():
        expected = theirs(x_t, t).sample
        assert float(expected.abs().mean()) > 0.05
        torch.testing.assert_close(ours(x_t, t), expected, rtol=1e-5, atol=1e-5)
        again = diffusers_network(ours, size)  # the way back has names of its own
        assert torch.equal(again(x_t, t).sample, expected)


def test_the_cifar10_network_has_the_paper_size():
    with torch.device("meta"):
        model = UNet()
    assert sum(p.numel() for p in model.parameters()) == 35_746_307


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_builds_a_network_for_its_images(recipe):
    config = load_recipe(recipe)
    channels, size = {"mnist": (1, 28), "cifar10": (3, 32), "digits": (1, 8)}[config.data.dataset]
    with torch.device("meta"):
        counted = 10 if config.model.num_classes == "auto" else config.model.num_classes
        settings = dataclasses.replace(config.model, num_classes=counted)
        model = build_unet(settings, channels, size, config.diffusion.num_timesteps)
        x = torch.empty(2, channels, size, size)
        assert model(x, torch.zeros(2, dtype=torch.int64)).shape == x.shape


@pytest.mark.parametrize(("channels", "size", "multipliers", "patch"), [(1, 28, (1, 1), 2), (3, 32, (1, 1), 4)])
def test_patches_keep_the_shape(channels, size, multipliers, patch):
    model = UNet(channels, 32, multipliers, 1, (), norm_groups=8, patch_size=patch)
    x_t = torch.randn(2, channels, size, size)
    assert model(x_t, torch.tensor([0, 999])).shape == x_t.shape


def test_the_initial_network_predicts_zero():
    """Ho et al.'s initialisation: the last convolution is zero, so the first loss is the variance of the noise."""
    with torch.no_grad():
        output = UNet(1, 32, (1, 2), 1, norm_groups=8)(torch.randn(2, 1, 8, 8), torch.tensor([0, 999]))
    assert float(output.abs().max()) == 0


@pytest.mark.parametrize("T", [2, 500, 2000, 10_000])
def test_position_means_noise_level_whatever_T(T):
    """The last step of any chain is position 999; of T = 1000 every step is its own position."""
    model = UNet(1, 32, (1,), 1, (), norm_groups=8, num_timesteps=T).eval()
    reference = UNet(1, 32, (1,), 1, (), norm_groups=8, num_timesteps=1000).eval()
    for parameter in model.parameters():  # as initialised, the embedding meets zeros and moves nothing
        torch.nn.init.normal_(parameter, std=0.1)
    reference.load_state_dict(model.state_dict())
    x_t = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        early, late = (reference(x_t, torch.tensor([t])) for t in (499, 999))
        assert float((early - late).abs().max()) > 0.01
        assert torch.equal(model(x_t, torch.tensor([T - 1])), reference(x_t, torch.tensor([999])))
        middle = model(x_t, torch.tensor([T // 2 - 1]))
        torch.testing.assert_close(middle, reference(x_t, torch.tensor([499])), rtol=1e-5, atol=1e-5)


def test_a_level_of_one_channel_per_group_ignores_t_and_warns():
    """Normalising a channel alone takes away the constant that the embedding added to it."""
    with pytest.warns(UserWarning, match="which then ignores the timestep"):
        model = UNet(1, 32, (1,), 1, ()).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x_t = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(x_t, torch.tensor([0])), model(x_t, torch.tensor([999])), rtol=0, atol=1e-5)


def test_embedding_is_sines_then_cosines():
    embedding = timestep_embedding(torch.tensor([0.0, 5.0]), 8)
    torch.testing.assert_close(embedding[0], torch.tensor([0.0] * 4 + [1.0] * 4))
    frequencies = 10_000.0 ** -(torch.arange(4) / 3)
    torch.testing.assert_close(embedding[1], torch.cat([(5 * frequencies).sin(), (5 * frequencies).cos()]))


def test_dropout_acts_in_training_only():
    model = UNet(1, 32, (1,), 1, (), norm_groups=8, dropout=0.5)
    torch.nn.init.normal_(model.conv_out.weight)
    torch.nn.init.normal_(model.down[0].blocks[0].conv2.weight)
    x_t, t = torch.randn(1, 1, 8, 8), torch.tensor([3])
    assert not torch.equal(model(x_t, t), model(x_t, t))
    model.eval()
    assert torch.equal(model(x_t, t), model(x_t, t))


@pytest.mark.parametrize(
    "make",
    [
        lambda: UNet(base_channels=48),
        lambda: UNet(base_channels=36, norm_groups=8),
        lambda: UNet(norm_groups=0),
        lambda: UNet(channel_multipliers=()),
        lambda: UNet(attention_levels=(4,)),
        lambda: UNet(dropout=1.0),
        lambda: UNet(attention_head_channels=7),
        lambda: UNet(1, 32, (1, 2), 1, norm_groups=8)(torch.zeros(1, 3, 8, 8), torch.tensor([0])),
        lambda: UNet(1, 32, (1, 2), 1, norm_groups=8)(torch.zeros(1, 1, 7, 8), torch.tensor([0])),
        lambda: build_unet(load_recipe("cifar10").model, 1, 28, 1000),
    ],
)
def test_what_cannot_be_built_is_refused(make):
    with pytest.raises(InputError):
        make()


def _plain_attention(q, k, v):
    weights = torch.softmax(q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
    return weights @ v.double()


@pytest.mark.parametrize("d", [4, 8, 16, 24])
def test_attention_is_its_formula(d):
    q, k, v = torch.randn(3, 5, 2, 9, d)
    torch.testing.assert_close(attention(q, k, v).double(), _plain_attention(q, k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("images_at_a_time", [1, 2, 5, 7])
def test_attention_in_bf16_is_its_formula_however_many_images_go_together(monkeypatch, images_at_a_time):
    monkeypatch.setattr("ddpm_lab.diffusion.unet.CACHED_WEIGHTS", images_at_a_time * 2 * 9 * 9)
    q, k, v = torch.randn(3, 5, 2, 9, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        result = attention(q, k, v)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), _plain_attention(q, k, v), rtol=2e-2, atol=2e-2)


def test_normalisation_takes_its_statistics_in_float32_under_bf16():
    """A mean far above the deviation would ruin statistics of 8 bits; rounding the result alone leaves 1 in 128."""
    x = 10 + torch.randn(2, 64, 14, 14)
    norm = torch.nn.GroupNorm(32, 64)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        x_bf16 = x.to(torch.bfloat16)
        result, expected = norm(x_bf16), norm(x_bf16.float())
    assert expected.dtype == torch.float32
    torch.testing.assert_close(result.float(), expected, rtol=2**-7, atol=2**-7)
