"""Laws of training: what each step sees, the rates, the average, and that steps are functions of (seed, k)."""

import dataclasses

import pytest
import torch

from ddpm_lab.core.config import TrainingConfig, load_recipe
from ddpm_lab.core.device import (
    deterministic_algorithms,
    precision_of,
    resolve_device,
    resolve_precision,
    uses_tf32,
)
from ddpm_lab.data.datasets import load_images
from ddpm_lab.diffusion.process import timestep_probabilities
from ddpm_lab.diffusion.schedule import linear_schedule
from ddpm_lab.diffusion.unet import build_unet
from ddpm_lab.models.checkpoint import LOSS_SCALE_FILE, OPTIMIZER_FILE
from ddpm_lab.training import optimizer
from ddpm_lab.training.loop import (
    LOSS_BANDS,
    NoiseLevelSampler,
    batch_indices,
    ema_decay,
    new_state,
    training_loop,
    validation_loss,
)
from ddpm_lab.training.optimizer import FIRST_SCALE, LossScale, decay_start, hidden_kernels, learning_rate


def config_of(tiny_recipe, **training):
    config = load_recipe(str(tiny_recipe))
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **training))


def state_of(config):
    torch.manual_seed(0)
    return new_state(build_unet(config.model, 1, 8, 1000), config.training)


def parameters(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_every_epoch_sees_every_image_once():
    seen = torch.cat([batch_indices(10, 4, seed=1, k=k) for k in range(5)])  # 20 positions: two epochs of 10
    assert sorted(seen[:10].tolist()) == list(range(10))
    assert sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    assert torch.equal(batch_indices(10, 4, 1, 3), seen[12:16])
    assert batch_indices(3, 8, 0, 0).bincount().tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


def test_learning_rate_rises_then_falls():
    flat = TrainingConfig(num_steps=100, warmup_steps=10, learning_rate=1.0)
    assert [learning_rate(flat, k) for k in (0, 4, 9, 10, 99)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    linear = dataclasses.replace(flat, decay="linear")
    assert [learning_rate(linear, k) for k in (9, 10, 55, 99)] == pytest.approx([1, 1, 0.5, 1 / 90])
    cosine = dataclasses.replace(flat, decay="cosine")
    assert [learning_rate(cosine, k) for k in (10, 55)] == pytest.approx([1, 0.5])
    assert 0 < learning_rate(cosine, 99) < 0.001


def test_learning_rate_may_fall_in_the_last_steps_only_and_restart():
    config = TrainingConfig(num_steps=110, warmup_steps=10, learning_rate=1.0, decay="linear", decay_share=0.2)
    assert decay_start(config) == 90
    assert [learning_rate(config, k) for k in (9, 10, 89, 90, 100, 109)] == pytest.approx([1, 1, 1, 1, 0.5, 0.05])
    longer = dataclasses.replace(config, num_steps=220)
    assert [learning_rate(longer, k) for k in (10, 89)] == [1, 1], "until it falls the rate does not depend on the end"
    restarted = [learning_rate(longer, k, start=110) for k in (110, 119, 120, 199, 210, 219)]
    assert restarted == pytest.approx([0.1, 1, 1, 1, 0.5, 0.05])


def test_noise_levels_are_drawn_as_often_as_configured():
    schedule, generator = linear_schedule(200), torch.Generator().manual_seed(0)
    levels = NoiseLevelSampler(TrainingConfig(noise_levels="lognormal"), schedule, "eps")
    t = levels.draw(200_000, generator)
    expected = timestep_probabilities(schedule, -1.2, 1.2)
    deviation = (expected * (1 - expected) / len(t)).sqrt()
    assert float(((t.bincount(minlength=200) / len(t) - expected) / deviation).abs().max()) < 4.5
    uniform = NoiseLevelSampler(TrainingConfig(), schedule, "eps").draw(8, torch.Generator().manual_seed(3))
    assert torch.equal(uniform, torch.randint(200, (8,), generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("noise_levels", ["uniform", "lognormal"])
def test_learned_weights_are_one_over_the_loss_and_1_in_the_mean(noise_levels):
    """Where the loss at t is known, they come to weigh it by its inverse; their mean over the draws stays 1."""
    schedule, generator = linear_schedule(1000), torch.Generator().manual_seed(0)
    levels = NoiseLevelSampler(TrainingConfig(noise_levels=noise_levels, weighting="learned"), schedule, "eps")
    mean_losses = torch.ones(LOSS_BANDS)
    for k in range(400):
        t = levels.draw(256, generator)
        levels.learn(mean_losses, t, 0.05 + t / 1000, k)
    t = levels.draw(100_000, generator)
    weights = levels.weights(t, mean_losses)
    assert float(weights.mean()) == pytest.approx(1, abs=0.01)
    _, band = weights.unique(return_inverse=True)  # a band is where the weight is the same
    assert int(band.max()) == LOSS_BANDS - 1
    weighed = torch.zeros(LOSS_BANDS).index_add_(0, band, weights * (0.05 + t / 1000)) / band.bincount()
    assert float((weighed / weighed.mean() - 1).abs().max()) < 0.1, "each band has the same part in the gradient"


def test_weights_are_applied_to_the_gradient_and_not_to_the_log(tiny_recipe):
    """min_snr: one step of the network differs from the simple one, and the reported losses are the same."""
    images, results = load_images("digits").images, []
    for weighting in ("simple", "min_snr"):
        config = config_of(tiny_recipe, num_steps=2, weighting=weighting, max_grad_norm=1e9)
        state = state_of(config)
        steps = list(training_loop(state, linear_schedule(), images, config))
        results.append((steps[0].losses, steps[0].grad_norm, parameters(state.model)))
    assert torch.equal(results[0][0], results[1][0])
    assert float(results[1][1]) < float(results[0][1])
    assert not torch.equal(results[0][2], results[1][2])


def test_warm_up_is_cut_to_the_run():
    assert TrainingConfig(num_steps=100).warmup_steps == 100


def test_average_is_short_at_first():
    config = TrainingConfig(ema_decay=0.999)
    assert [ema_decay(config, k) for k in (0, 90, 10**6)] == pytest.approx([0.1, 0.91, 0.999])


def test_average_follows_its_recursion(tiny_recipe):
    config = config_of(tiny_recipe, num_steps=5)
    state = state_of(config)
    expected = parameters(state.model)
    for k, _ in enumerate(training_loop(state, linear_schedule(), load_images("digits").images, config)):
        decay = ema_decay(config.training, k)
        expected = decay * expected + (1 - decay) * parameters(state.model)
        torch.testing.assert_close(parameters(state.ema), expected)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_step_depends_on_its_number_and_nothing_before(tiny_recipe, optimizer):
    """Two steps of one state, the second from a copy with another random state around it, end in the same bits."""
    config, images = config_of(tiny_recipe, num_steps=4, optimizer=optimizer), load_images("digits").images
    whole, resumed = state_of(config), state_of(config)
    for step in training_loop(whole, linear_schedule(), images, config):
        if step.step == 2:
            for ours, theirs in ((resumed.model, whole.model), (resumed.ema, whole.ema)):
                ours.load_state_dict(theirs.state_dict())
            saved = whole.tensors()[OPTIMIZER_FILE]
            for name, tensor in resumed.tensors()[OPTIMIZER_FILE].items():
                tensor.copy_(saved[name])
            resumed.set_step(2)
    torch.manual_seed(12345)
    torch.randn(7)
    for _ in training_loop(resumed, linear_schedule(), images, config):
        pass
    assert torch.equal(parameters(whole.model), parameters(resumed.model))
    assert torch.equal(parameters(whole.ema), parameters(resumed.ema))


@pytest.mark.parametrize("channels_last", [False, True])
def test_muon_is_its_definition(tiny_recipe, channels_last):
    """A hidden kernel moves by rate * 0.2 sqrt(max(rows, columns)) times an orthogonal matrix; all else as by Adam."""
    states = {}
    for name in ("muon", "adam"):
        config = config_of(tiny_recipe, optimizer=name)
        torch.manual_seed(0)
        model = build_unet(config.model, 1, 8, 1000)
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        states[name] = new_state(model, config.training)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))
    before = {name: p.detach().clone() for name, p in states["muon"].model.named_parameters()}
    for state in states.values():
        state.optimizer.step(1e-3)
    hidden = hidden_kernels(states["muon"].model)
    assert {"down.0.blocks.0.conv1.weight", "middle_attention.query_key_value.weight"} <= hidden.keys()
    assert not any("embedding" in name or name.startswith(("conv_in", "conv_out")) for name in hidden)
    by_adam = dict(states["adam"].model.named_parameters())
    for name, parameter in states["muon"].model.named_parameters():
        if name not in hidden:
            assert torch.equal(parameter, by_adam[name]), name
            continue
        step = (before[name] - parameter.detach()).flatten(1) / 1e-3
        # five iterations in bfloat16 leave them near 1
        singular = torch.linalg.svdvals(step) / (0.2 * max(step.shape) ** 0.5)
        assert 0.5 < float(singular.min()) <= float(singular.max()) < 1.3, name
        rms = float(step.square().mean().sqrt())
        assert rms == pytest.approx(0.2, rel=0.3), "as large as Adam's steps are"
    tensors = states["muon"].optimizer.tensors()
    assert all(tensor.shape == before[name.partition(".")[2]].shape for name, tensor in tensors.items())


def test_seeds_differ(tiny_recipe):
    images, ends = load_images("digits").images, []
    for seed in (0, 1):
        config = config_of(tiny_recipe, num_steps=2, seed=seed)
        state = state_of(config)
        losses = [step.losses for step in training_loop(state, linear_schedule(), images, config)]
        ends.append(torch.stack(losses))
    assert not torch.equal(*ends)


def test_gradients_are_clipped_and_their_norm_reported(tiny_recipe):
    """Plain gradient descent of rate 1 moves the weights by the clipped norm exactly."""
    config = config_of(tiny_recipe, num_steps=2, max_grad_norm=1e-3, learning_rate=1.0, warmup_steps=0)
    state = state_of(config)
    state.optimizer._optimizers = [torch.optim.SGD(state.model.parameters(), lr=1.0)]
    before = parameters(state.model)
    step = next(training_loop(state, linear_schedule(), load_images("digits").images, config))
    assert float(step.grad_norm) > 1e-3
    assert float((parameters(state.model) - before).norm()) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("prediction", "precision"),
    [("eps", "float32"), ("eps", "bf16"), ("eps", "fp16"), ("x_0", "float32"), ("v", "float32")],
)
def test_training_learns(tiny_recipe, prediction, precision):
    config = config_of(tiny_recipe, num_steps=40, learning_rate=2e-3, precision=precision, batch_size=16)
    config = dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, prediction=prediction))
    state, images = state_of(config), load_images("digits").images
    before = validation_loss(state.ema, linear_schedule(), images[:64], prediction)
    losses = [step.losses for step in training_loop(state, linear_schedule(), images, config)]
    after = validation_loss(state.ema, linear_schedule(), images[:64], prediction)
    assert after < 0.8 * before
    assert losses[0].dtype == torch.float32
    assert next(state.model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.03), ("fp16", 0.003)])
def test_half_precision_computes_what_float32_does_up_to_its_digits(tiny_recipe, precision, tolerance):
    """In losses and in gradients, which in float16 are scaled and scaled back."""
    images, first = load_images("digits").images, []
    for each in ("float32", precision):
        config = config_of(tiny_recipe, num_steps=1, precision=each)
        state = state_of(config)
        torch.nn.init.normal_(state.model.conv_out.weight, std=0.1)
        step = next(training_loop(state, linear_schedule(), images, config))
        gradient = torch.cat([p.grad.flatten() for p in state.model.parameters()]) * step.grad_norm  # before clipping
        first.append((step.losses, gradient))
    torch.testing.assert_close(first[0][0], first[1][0], rtol=tolerance, atol=tolerance / 3)
    assert float((first[0][1] - first[1][1]).norm() / first[0][1].norm()) < 2 * tolerance
    assert not torch.equal(first[0][0], first[1][0])


def float16(tiny_recipe, scale, **training):
    """A config, and a state whose loss scale overflows from 2^17 on; its gradients fit float16 below."""
    config = config_of(tiny_recipe, precision="fp16", **training)
    state = state_of(config)
    state.loss_scale.scale.fill_(scale)
    return config, state


def copied(state):
    return {name: {key: tensor.clone() for key, tensor in file.items()} for name, file in state.tensors().items()}


@pytest.mark.parametrize("weighting", ["simple", "learned"])
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_step_that_overflows_changes_only_its_number_and_the_scale(tiny_recipe, optimizer, weighting):
    images = load_images("digits").images
    config, state = float16(tiny_recipe, 2.0**30, num_steps=2, optimizer=optimizer, weighting=weighting)
    before = copied(state)
    for number, step in enumerate(training_loop(state, linear_schedule(), images, config), 1):
        assert step.skipped
        assert not step.grad_norm.isfinite()
        assert (step.step, step.loss_scale, state.step) == (number, 2.0 ** (30 - number), number)
        assert step.learning_rate == learning_rate(config.training, number - 1)
    after = copied(state)
    scale = after.pop(LOSS_SCALE_FILE)
    assert {name: float(tensor) for name, tensor in scale.items()} == {
        "scale": 2.0**28,
        "steps_since_change": 0,
        "skipped_steps": 2,
    }
    for name, tensors in after.items():
        assert all(torch.equal(tensor, before[name][key]) for key, tensor in tensors.items()), name


def test_the_steps_after_an_overflow_are_those_of_a_run_that_begins_there(tiny_recipe):
    """Two steps are skipped; then batch, rate and Adam's corrections are as if step 2 was the first, to the bit."""
    images, ends = load_images("digits").images, []
    for scale, begin in ((2.0**18, 0), (2.0**16, 2)):
        config, state = float16(tiny_recipe, scale, num_steps=5)
        state.step = begin
        steps = list(training_loop(state, linear_schedule(), images, config))
        assert sum(step.skipped for step in steps) == (2 if begin == 0 else 0)
        ends.append((parameters(state.model), parameters(state.ema), steps[-1].losses))
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_the_loss_scale_halves_and_grows(monkeypatch):
    monkeypatch.setattr(optimizer, "STEPS_TO_GROW", 3)
    scale, seen = LossScale(torch.device("cpu")), []
    for finite in (True, True, True, True, False, True, True, False, True, True, True):
        scale.update(finite)
        seen.append(float(scale.scale) / FIRST_SCALE)
    assert seen == [1, 1, 2, 2, 1, 1, 1, 0.5, 0.5, 0.5, 1]
    assert int(scale.skipped_steps) == 2
    scale.scale.fill_(optimizer.GREATEST_SCALE)
    for _ in range(3):
        scale.update(True)
    assert float(scale.scale) == optimizer.GREATEST_SCALE


def test_gradients_too_small_for_float16_need_the_scale(tiny_recipe):
    """At 2^-24 all that reaches the network is 0; at 2^16 its gradient is that of float32."""
    images, gradients = load_images("digits").images, []
    for precision, scale in (("float32", 1.0), ("fp16", 2.0**-24), ("fp16", 2.0**16)):
        config = config_of(tiny_recipe, num_steps=1, precision=precision)
        state = state_of(config)
        torch.nn.init.normal_(state.model.conv_out.weight, std=0.1)
        if state.loss_scale is not None:
            state.loss_scale.scale.fill_(scale)
        next(training_loop(state, linear_schedule(), images, config))
        gradients.append(state.model.conv_in.weight.grad)
    assert not gradients[1].any()
    assert float((gradients[2] - gradients[0]).norm() / gradients[0].norm()) < 0.01


def test_validation_loss_is_always_the_same_draw():
    schedule, images = linear_schedule(), load_images("digits", "test").images[:50]
    model = lambda x_t, t: 0.1 * x_t  # noqa: E731
    loss = validation_loss(model, schedule, images, "eps")
    torch.manual_seed(99)
    assert validation_loss(model, schedule, images, "eps") == loss
    assert validation_loss(model, schedule, images, "eps", batch_size=7) == pytest.approx(loss, rel=1e-6)


def test_validation_visits_the_whole_chain_evenly():
    seen = []

    def model(x_t, t):
        seen.append(t)
        return x_t

    validation_loss(model, linear_schedule(), load_images("digits", "test").images[:100], "eps")
    assert sorted(torch.cat(seen).tolist()) == list(range(5, 1000, 10))


def test_devices_and_precisions(monkeypatch):
    assert resolve_device("cpu").type == "cpu"
    assert resolve_precision("float32", torch.device("cpu")) == torch.float32
    assert resolve_precision("bf16", torch.device("cpu")) == torch.bfloat16
    for capable, expected in (({"avx512_bf16": True}, torch.bfloat16), ({"avx2": True, "bf16": False}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capable=capable: capable, raising=False)
        assert resolve_precision("auto", torch.device("cpu")) == expected
    assert resolve_precision("auto", torch.device("mps")) == torch.float32
    with pytest.raises(ValueError, match="auto, cpu, cuda or mps"):
        resolve_device("tpu")


@pytest.mark.parametrize(("capability", "expected"), [((6, 1), "float32"), ((7, 0), "fp16"), ((7, 5), "fp16"),
                                                      ((8, 0), "bf16"), ((9, 0), "bf16")])  # fmt: skip
def test_auto_is_what_a_card_is_fast_at(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision_of(resolve_precision("auto", torch.device("cuda", 0))) == expected


def test_float32_is_never_tf32():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    assert uses_tf32()
    resolve_device("cpu")
    assert not uses_tf32()


def test_determinism_ends_with_its_context():
    for enabled in (False, True):
        with deterministic_algorithms(enabled):
            assert torch.are_deterministic_algorithms_enabled() is enabled
        assert not torch.are_deterministic_algorithms_enabled()
