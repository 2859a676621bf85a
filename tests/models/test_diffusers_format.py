"""diffusers, read and written: the same images from the same noise at every step; unsupported settings by name."""

import json
import os
import shutil
import warnings

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.pipelines.ddim import pipeline_ddim
from diffusers.schedulers import scheduling_ddpm
from diffusers.training_utils import EMAModel

from ddpm_lab import load
from ddpm_lab.cli.main import run_command
from ddpm_lab.core.config import SamplingConfig
from ddpm_lab.diffusion.samplers import ddpm_steps
from ddpm_lab.sampling.generation import build_sampler
from tests.conftest import tree_hash

# What diffusers' example of unconditional training makes, smaller: all else has its default.
EXAMPLE = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"), "norm_num_groups": 4,
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
# The settings of google/ddpm-cifar10-32, smaller.
NETWORK = {
    "act_fn": "silu", "attention_head_dim": None, "block_out_channels": (16, 32), "center_input_sample": False,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "downsample_padding": 0, "flip_sin_to_cos": False,
    "freq_shift": 1, "in_channels": 3, "layers_per_block": 1, "mid_block_scale_factor": 1, "norm_eps": 1e-6,
    "norm_num_groups": 8, "out_channels": 3, "sample_size": 8, "time_embedding_type": "positional",
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
PROCESS = {
    "beta_end": 0.02, "beta_schedule": "linear", "beta_start": 1e-4, "clip_sample": True, "num_train_timesteps": 1000,
    "variance_type": "fixed_large",
}  # fmt: skip


def save(folder, network=NETWORK, scheduler=DDPMScheduler, **process):
    torch.manual_seed(0)
    if scheduler is DDPMScheduler:
        process = PROCESS | process
    DDPMPipeline(UNet2DModel(**network), scheduler(**process)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return save(tmp_path_factory.mktemp("pipelines") / "theirs")


def assert_same_steps(ours, folder, monkeypatch, every=1):
    """Every step of Algorithm 2 is the pipeline's, from the same state and noise; so is its image at the end.

    The pipeline computes 1 - alpha_bar in float32, whose rounding alone is up to 1e-4 in the last ten steps, so each
    step is compared with its scheduler's tables in float64, and the image with the pipeline as it comes.
    """
    pipe, exact = (DDPMPipeline.from_pretrained(folder) for _ in range(2))
    T = ours.schedule.num_timesteps
    for scheduler in (pipe.scheduler, exact.scheduler):
        scheduler.set_timesteps(T)
    exact.scheduler.alphas_cumprod = ours.schedule.alpha_bar
    network, shape = pipe.unet.eval(), (2, *ours.image_shape)

    def noise(step):
        return torch.randn(shape, generator=torch.Generator().manual_seed(step + 1))

    steps = ddpm_steps(ours.model, ours.schedule, noise(-1), noise=noise, prediction=ours.config.diffusion.prediction,
                       variance=build_sampler(ours, SamplingConfig(sampler="ddpm")).config.variance)  # fmt: skip
    image = noise(-1)
    for index, (t, step) in enumerate(zip(pipe.scheduler.timesteps, steps, strict=True)):
        if index % every:
            continue
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, index=index, **flags: noise(index))
        with torch.no_grad():
            expected = exact.scheduler.step(network(step.x_t, t).sample, t, step.x_t).prev_sample
            image = pipe.scheduler.step(network(image, t).sample, t, image).prev_sample
        torch.testing.assert_close(step.x_s, expected, rtol=0, atol=1e-5, check_dtype=False)
    assert index == T - 1
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod.double(), ours.schedule.alpha_bar, rtol=1e-4, atol=1e-7)
    if every == 1:
        torch.testing.assert_close(step.x_s, image, rtol=0, atol=1 / 255)


@pytest.mark.parametrize(
    ("network", "prediction", "betas", "variance", "T"),
    [(NETWORK, "epsilon", "linear", "fixed_large", 1000), (NETWORK, "epsilon", "linear", "fixed_small", 1000),
     (EXAMPLE, "epsilon", "linear", "fixed_small", 1000), (EXAMPLE, "epsilon", "linear", "fixed_small", 300),
     (NETWORK, "v_prediction", "squaredcos_cap_v2", "fixed_large", 1000),
     (EXAMPLE, "v_prediction", "squaredcos_cap_v2", "fixed_large", 300)],
)  # fmt: skip
def test_an_imported_pipeline_samples_the_same_images(tmp_path, monkeypatch, network, prediction, betas, variance, T):
    folder = save(
        tmp_path / "theirs", network, prediction_type=prediction, beta_schedule=betas, variance_type=variance,
        num_train_timesteps=T,
    )  # fmt: skip
    assert run_command(["import", str(folder), "--run", str(tmp_path / "run"), "--dataset", "cifar10"]) == 0
    ours = load(tmp_path / "run", device="cpu")
    assert ours.config.data.dataset == "cifar10"
    whole = [(NETWORK, "fixed_large", "linear", 1000), (EXAMPLE, "fixed_small", "linear", 300)]
    assert_same_steps(ours, folder, monkeypatch, every=1 if (network, variance, betas, T) in whole else 20)
    again = tmp_path / "again"
    assert run_command(["export", str(tmp_path / "run"), "--to", "diffusers", "--out", str(again)]) == 0
    for name in (UNET, SCHEDULER):
        before, after = (json.loads((pipeline / name).read_text()) for pipeline in (folder, again))
        assert before | {"timestep_spacing": "trailing"} == after | {"timestep_spacing": "trailing"}
    direct = load(folder, device="cpu")
    assert direct.weights_sha256 == ours.weights_sha256
    assert direct.image_shape == ours.image_shape == (3, 8, 8)


def assert_same_ddim_steps(ours, folder, monkeypatch):
    """As `assert_same_steps`, for the default sampler and a DDIM pipeline; and its own call makes the same images."""
    pipe, exact = (DDIMPipeline.from_pretrained(folder) for _ in range(2))
    exact.scheduler.set_timesteps(50)
    exact.scheduler.alphas_cumprod = ours.schedule.alpha_bar
    x_T, network = torch.randn(2, *ours.image_shape), pipe.unet.eval()
    steps = build_sampler(ours, SamplingConfig()).steps(x_T, None)
    for t, step in zip(exact.scheduler.timesteps, steps, strict=True):
        with torch.no_grad():
            output = network(step.x_t, t).sample
            expected = exact.scheduler.step(output, t, step.x_t, use_clipped_model_output=True).prev_sample
        torch.testing.assert_close(step.x_s, expected, rtol=0, atol=1e-5, check_dtype=False)
    monkeypatch.setattr(pipeline_ddim, "randn_tensor", lambda *_, **flags: x_T)
    images = pipe(2, num_inference_steps=50, use_clipped_model_output=True, output_type="np").images
    torch.testing.assert_close((step.x_s.permute(0, 2, 3, 1) + 1).numpy() / 2, images, rtol=0, atol=1 / 255)


@pytest.mark.parametrize(("scheduler", "spacing"), [(DDIMScheduler, "leading"), (DDIMScheduler, "trailing"),
                                                    (DDPMScheduler, "leading")])  # fmt: skip
def test_a_ddim_pipeline_samples_the_same_images_and_comes_out_again(tmp_path, monkeypatch, scheduler, spacing):
    """Whatever its scheduler was before; and the default sampler is the pipeline's, not that of our own networks."""
    folder, run, again = tmp_path / "theirs", tmp_path / "run", tmp_path / "again"
    save(folder, EXAMPLE, scheduler, timestep_spacing=spacing)
    edit("model_index.json", _class_name="DDIMPipeline")(folder)
    assert run_command(["import", str(folder), "--run", str(run)]) == 0
    assert load(folder, device="cpu").spacing == load(run, device="cpu").spacing
    assert_same_ddim_steps(load(run, device="cpu"), folder, monkeypatch)
    assert run_command(["export", str(run), "--to", "diffusers", "--out", str(again)]) == 0
    DDIMPipeline.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    for name in ("model_index.json", UNET, SCHEDULER):
        before, after = (json.loads((pipeline / name).read_text()) for pipeline in (tmp_path / "saved", again))
        before.pop("variance_type", None)  # which DDIMScheduler keeps, and does not use
        assert {**before, "_name_or_path": 0} == {**after, "_name_or_path": 0}, name
    assert "DDIMPipeline.from_pretrained" in (again / "README.md").read_text()


def test_a_network_of_ours_with_the_settings_of_diffusers_becomes_a_ddim_pipeline(tiny_recipe, tmp_path, monkeypatch):
    """And one for T = 60, whose betas are rescaled, a pipeline at all; both come back."""
    settings = ["--model.downsample-padding", "1", "--model.flip-sin-to-cos", "--model.freq-shift", "0"]
    settings += ["--model.norm-eps", "1e-5", "--training.num-steps", "5", "--training.learning-rate", "1e-2"]
    shorter = ["--diffusion.num-timesteps", "60", "--model.num-positions", "60"]
    for name, more, flags in (("long", [], ["--sampler", "ddim"]), ("short", shorter, [])):
        run, out, back = (tmp_path / f"{name}-{kind}" for kind in ("run", "out", "back"))
        command = ["train", str(tiny_recipe), "--run", str(run), "--device", "cpu", "--training.precision", "float32"]
        assert run_command([*command, *settings, *more]) == 0
        assert run_command(["export", str(run), "--to", "diffusers", "--out", str(out), *flags]) == 0
        assert run_command(["import", str(out), "--run", str(back)]) == 0
        before, after = load(run, device="cpu"), load(back, device="cpu")
        check = assert_same_ddim_steps if flags else assert_same_steps
        check(after, out, monkeypatch)
        assert after.weights_sha256 == before.weights_sha256
        assert (after.config.model, after.config.diffusion) == (before.config.model, before.config.diffusion)


def test_averaged_weights_beside_those_as_trained_are_ema_and_raw(tmp_path, capsys):
    """`unet_ema` in a checkpoint of diffusers' example, in the final pipeline, and imported."""
    folder = save(tmp_path / "theirs", EXAMPLE)
    checkpoint, run = folder / "checkpoint-500", tmp_path / "run"
    raw = UNet2DModel.from_pretrained(folder / "unet")
    average = EMAModel(raw.parameters(), decay=0.5, model_cls=UNet2DModel, model_config=raw.config)
    with torch.no_grad():
        for parameter in raw.parameters():
            parameter += 1
    average.save_pretrained(checkpoint / "unet_ema")
    raw.save_pretrained(checkpoint / "unet")
    expected = {name: load(checkpoint / part, device="cpu").weights_sha256
                for name, part in (("raw", "unet"), ("ema", "unet_ema"))}  # fmt: skip
    assert expected["raw"] != expected["ema"]
    assert run_command(["import", str(checkpoint), "--run", str(run)]) == 0
    for source in (checkpoint, run):
        for name, sha256 in expected.items():
            loaded = load(source, weights=name, device="cpu")
            assert (loaded.weights, loaded.weights_sha256) == (name, sha256)
    capsys.readouterr()
    for source in (folder, checkpoint / "unet_ema"):
        assert run_command(["sample", str(source), "--weights", "raw", "--out", str(tmp_path / "grid.png")]) == 2
        assert "has one set of weights (no unet_ema beside unet)" in capsys.readouterr().err
    edit("unet_ema/config.json", freq_shift=1)(checkpoint)
    assert run_command(["import", str(checkpoint), "--run", str(tmp_path / "other")]) == 2
    assert "unet and unet_ema have the settings of different networks" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:no scheduler")
def test_a_network_with_classes_comes_in_with_its_labels(tmp_path, capsys):
    theirs = UNet2DModel(**EXAMPLE, num_class_embeds=3).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    run = tmp_path / "run"
    assert run_command(["import", str(tmp_path / "theirs"), "--run", str(run)]) == 0
    ours = load(run, device="cpu")
    x_t, t, y = torch.randn(3, 3, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([2, 0, 1])
    with torch.no_grad():
        torch.testing.assert_close(ours.model(x_t, t, y), theirs(x_t, t, y).sample, rtol=1e-5, atol=1e-5)
    capsys.readouterr()
    out = ["--num-steps", "2", "--out", str(tmp_path / "grid.png")]
    assert run_command(["sample", str(run), "--class", "3", *out]) == 2
    assert "has the classes 0, 1, 2, not 3" in capsys.readouterr().err
    assert run_command(["sample", str(run), "--guidance", "2", *out]) == 2
    assert "cannot sample without a class" in capsys.readouterr().err
    assert run_command(["sample", str(run), "--class", "1", "--num-images", "2", *out]) == 0


def test_exported_files_have_the_rights_of_new_files(tiny_run, tmp_path):
    before = os.umask(0o027)
    try:
        assert run_command(["export", str(tiny_run), "--to", "diffusers", "--out", str(tmp_path / "out")]) == 0
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()} == {0o640}


def test_an_exported_generator_is_a_pipeline_that_samples_ours(tiny_run, tmp_path, monkeypatch):
    """And comes back with the same weights, settings that matter to sampling, and bytes."""
    out, run = tmp_path / "out", tmp_path / "run"
    assert run_command(["export", str(tiny_run), "--to", "diffusers", "--out", str(out)]) == 0
    ours = load(tiny_run, device="cpu")
    assert_same_steps(ours, out, monkeypatch, every=20)
    assert run_command(["import", str(out), "--run", str(run)]) == 0
    back = load(run, device="cpu")
    assert back.weights_sha256 == ours.weights_sha256
    assert (back.config.model, back.config.diffusion) == (ours.config.model, ours.config.diffusion)
    assert run_command(["export", str(run), "--to", "diffusers", "--out", str(tmp_path / "again")]) == 0
    names = ("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json")
    first, second = tree_hash(out), tree_hash(tmp_path / "again")
    assert [first[name] for name in names] == [second[name] for name in names]


def test_scale_and_shift_go_both_ways(tiny_recipe, tmp_path, monkeypatch):
    run, out, back = tmp_path / "run", tmp_path / "out", tmp_path / "back"
    settings = ["--model.time-conditioning", "scale_shift", "--training.num-steps", "5", "--device", "cpu"]
    rate = ["--training.learning-rate", "1e-2", "--training.precision", "float32"]
    assert run_command(["train", str(tiny_recipe), "--run", str(run), *settings, *rate]) == 0
    assert run_command(["export", str(run), "--to", "diffusers", "--out", str(out)]) == 0
    ours = load(run, device="cpu")
    assert_same_steps(ours, out, monkeypatch, every=100)
    assert run_command(["import", str(out), "--run", str(back)]) == 0
    assert load(back, device="cpu").weights_sha256 == ours.weights_sha256
    assert load(back, device="cpu").config.model == ours.config.model


def test_an_imported_run_is_sampled_and_described_but_not_trained(theirs, tiny_recipe, tmp_path, capsys):
    run = tmp_path / "run"
    assert run_command(["import", str(theirs), "--run", str(run)]) == 0
    made = tree_hash(run)
    assert run_command(["info", str(run)]) == 0
    assert "trained 0 steps" in capsys.readouterr().out
    for source in (run, theirs):
        grid = tmp_path / f"{source.name}.png"
        assert run_command(["sample", str(source), "--num-images", "4", "--num-steps", "2", "--out", str(grid)]) == 0
    assert (tmp_path / "run.png").read_bytes() == (tmp_path / "theirs.png").read_bytes()
    score = ["--features", "classifier"]
    for command in (["train", str(tiny_recipe), "--run", str(run)], ["evaluate", str(run), *score],
                    ["evaluate", str(theirs), *score], ["import", str(theirs), "--run", str(run)]):  # fmt: skip
        assert run_command(command) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "was imported and cannot be trained" in errors[0]
    assert "does not name its training images; give --reference" in errors[1]
    assert errors[2] == errors[1]
    assert "exists; name a new folder" in errors[3]
    assert tree_hash(run) == made


def test_files_at_the_top_are_found_as_older_folders_have_them(theirs, tmp_path):
    """As in google/ddpm-cifar10-32: network and scheduler in one folder beside model_index.json."""
    flat = tmp_path / "flat"
    shutil.copytree(theirs / "unet", flat)
    shutil.copy(theirs / "scheduler" / "scheduler_config.json", flat)
    shutil.copy(theirs / "model_index.json", flat)
    assert load(flat, device="cpu").weights_sha256 == load(theirs, device="cpu").weights_sha256


def test_a_network_alone_finds_its_scheduler_or_warns(tmp_path, capsys):
    """Also that of an average, or of a checkpoint, below its pipeline; an imported run still warns."""
    folder = save(tmp_path / "pipeline", prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
    shutil.copytree(folder / "unet", folder / "unet_ema")
    for name in ("unet", "unet_ema"):
        shutil.copytree(folder / "unet", folder / "checkpoint-500" / name)
    for place in ("unet", "unet_ema", "checkpoint-500", "checkpoint-500/unet", "checkpoint-500/unet_ema"):
        inside = load(folder / place, device="cpu").config.diffusion
        assert (inside.schedule, inside.prediction) == ("cosine", "v"), place
    shutil.copytree(folder / "unet", folder / "alone")
    words = "taken for linear betas of T = 1000 that predict eps"
    with pytest.warns(UserWarning, match=words):
        assert load(folder / "alone", device="cpu").config.diffusion.prediction == "eps"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warnings, "filters", [])
        assert run_command(["import", str(folder / "alone"), "--run", str(tmp_path / "run")]) == 0
        assert run_command(["info", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().err.count(words) == 2


def test_a_long_setting_is_cut_in_a_message(theirs, tmp_path, capsys):
    folder = tmp_path / "theirs"
    shutil.copytree(theirs, folder)
    edit(SCHEDULER, trained_betas=[0.01] * 3000)(folder)
    assert run_command(["info", str(folder)]) == 2
    err = capsys.readouterr().err
    assert "trained_betas [0.01, 0.01" in err
    assert len(err) < 400


def test_the_advice_for_pickled_weights_works(theirs, tmp_path, capsys):
    folder = tmp_path / "theirs"
    shutil.copytree(theirs, folder)
    UNet2DModel.from_pretrained(folder / "unet").save_pretrained(folder / "unet", safe_serialization=False)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert run_command(["info", str(folder)]) == 2
    advice = capsys.readouterr().err.partition("diffusers writes it there: ")[2]
    exec(advice)
    assert load(folder, device="cpu").weights_sha256 == load(theirs, device="cpu").weights_sha256


@pytest.mark.filterwarnings("ignore:no scheduler")
def test_a_network_inside_a_run_folder_does_not_belong_to_the_run(theirs, tiny_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    shutil.copytree(theirs / "unet", run / "x" / "unet")
    assert load(run / "x" / "unet", device="cpu").run_dir is None
    assert load(run, device="cpu").run_dir == run
    assert run_command(["info", str(run / "x" / "unet")]) == 0
    assert "checkpoints:" not in capsys.readouterr().out


UNET, SCHEDULER, DDIM = "unet/config.json", "scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}


def edit(name, **values):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def without_betas(folder):
    settings = json.loads((folder / SCHEDULER).read_text())
    del settings["beta_schedule"]
    (folder / SCHEDULER).write_text(json.dumps(settings))


def only_pickled(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))


def cut(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edit("model_index.json", _class_name="PNDMPipeline"),
         '_class_name "PNDMPipeline" is not supported; DDPMPipeline and DDIMPipeline are'),
        (edit(UNET, _class_name="UNet2DConditionModel"), '_class_name "UNet2DConditionModel" is not supported'),
        (edit(UNET, num_class_embeds=1), "num_class_embeds must be from 2 to 100000, not 1"),
        (edit(UNET, class_embed_type="timestep"), 'class_embed_type "timestep" is not supported; null is'),
        (edit(UNET, mid_block_scale_factor=2), "mid_block_scale_factor 2 is not supported; 1 is"),
        (edit(UNET, add_attention=False), "add_attention false is not supported; true is"),
        (edit(UNET, attention_head_dim=12), "attention_head_dim must divide the 32 channels of level 1, which 12 does"),
        (edit(UNET, resnet_time_scale_shift="spatial"), 'resnet_time_scale_shift "spatial" is not supported'),
        (edit(UNET, resnet_time_scale_shift="scale_shift"), "attn_norm_num_groups null is not supported; 8 is"),
        (edit(UNET, freq_shift=2), "freq_shift must be from 0 to 1, not 2"),
        (edit(UNET, downsample_padding=2), "downsample_padding must be from 0 to 1, not 2"),
        (edit(UNET, block_out_channels=[16, 40]), "block_out_channels [16, 40] is not supported; [16, 32] is"),
        (edit(UNET, down_block_types=["DownBlock2D", "SkipDownBlock2D"]), "down_block_types"),
        (edit(UNET, up_block_types=["UpBlock2D", "AttnUpBlock2D"]), "up_block_types"),
        (edit(UNET, sample_size=[8, 16]), "sample_size [8, 16] is not supported"),
        (edit(UNET, sample_size=-8), "sample_size -8 is not supported"),
        (edit(UNET, sample_size=True), "sample_size true is not supported"),
        (edit(UNET, in_channels=4, out_channels=4), "in_channels 4"),
        (edit(UNET, layers_per_block=2), "down_blocks.0.resnets.1.conv1.bias is absent there, (16,) in this network"),
        (edit(UNET, block_out_channels="wide"), "is not a UNet2DModel's"),
        (edit(UNET, norm_num_groups=3), "model.base_channels must be a multiple"),
        (edit(SCHEDULER, num_train_timesteps=20_000), "diffusion.num_timesteps must be from 2 to 10000, not 20000"),
        (edit(SCHEDULER, num_train_timesteps=[]), "is not a scheduler's"),
        (edit(SCHEDULER, beta_schedule="scaled_linear"), 'beta_schedule "scaled_linear" is not supported'),
        (edit(SCHEDULER, beta_end=0.03), "beta_end 0.03 is not supported"),
        (edit(SCHEDULER, prediction_type="score"), 'prediction_type "score" is not supported'),
        (edit(SCHEDULER, clip_sample=False), "clip_sample false is not supported"),
        (edit(SCHEDULER, thresholding=True), "thresholding true is not supported"),
        (edit(SCHEDULER, _class_name="PNDMScheduler"), '"PNDMScheduler" is not supported; DDPMScheduler and DDIMS'),
        (edit(SCHEDULER, **DDIM, timestep_spacing="linspace"), '"linspace" is not supported; leading and trailing are'),
        (edit(SCHEDULER, **DDIM, set_alpha_to_one=False), "set_alpha_to_one false is not supported; true is"),
        (edit(SCHEDULER, **DDIM, steps_offset=1), "steps_offset 1 is not supported; 0 is"),
        (edit(SCHEDULER, **DDIM, clip_sample=False), "clip_sample false is not supported; true is"),
        (edit(SCHEDULER, variance_type="learned"), '"learned" is not supported; fixed_large and fixed_small are'),
        (without_betas, "beta_schedule null is not supported"),
        (lambda folder: (folder / UNET).write_text("{"), "is not JSON"),
        (lambda folder: (folder / SCHEDULER).unlink(), "cannot be read"),
        (only_pickled, "holds no diffusion_pytorch_model.safetensors but config.json, diffusion_pytorch_model.bin"),
        (cut, "cannot be read"),
    ],
)  # fmt: skip
def test_unsupported_settings_are_refused_by_name(theirs, tmp_path, capsys, change, words):
    folder = tmp_path / "theirs"
    shutil.copytree(theirs, folder)
    change(folder)
    for command in (["import", str(folder), "--run", str(tmp_path / "run")], ["info", str(folder)]):
        assert run_command(command) == 2
        err = capsys.readouterr().err.splitlines()
        assert len(err) == 1, err
        assert words in err[0]
    assert not (tmp_path / "run").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize("flag", [["--sampler", "dpmpp"], ["--num-steps", "5"], ["--guidance", "2"]])
def test_flags_of_another_form_are_refused(tiny_run, tmp_path, capsys, flag):
    assert run_command(["export", str(tiny_run), "--to", "diffusers", "--out", str(tmp_path / "out"), *flag]) == 2
    assert "for --to onnx" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_written_are_reported_first(tiny_run, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path / "empty")
    for out in (".", str(tmp_path / "empty"), str(tmp_path / "linked"), str(tmp_path / "dangling")):
        assert run_command(["export", str(tiny_run), "--to", "diffusers", "--out", out]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: --out {out} ")
    monkeypatch.chdir(tmp_path)
    assert run_command(["export", str(tiny_run), "--to", "diffusers", "--out", "empty"]) == 0
    assert (tmp_path / "empty" / "model_index.json").is_file()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["--diffusion.num-timesteps", "2000"], "would have to be trained with --model.num-positions 2000"),
        (["--model.patch-size", "2", "--model.channel-multipliers", "1"], "no network on patches"),
        (["--diffusion.prediction", "edm"], "have no prediction edm; they have eps, x_0, v"),
    ],
)
def test_what_diffusers_cannot_express_is_refused(tiny_recipe, tmp_path, capsys, settings, words):
    run, out = tmp_path / "run", tmp_path / "out"
    command = ["train", str(tiny_recipe), "--run", str(run), "--training.num-steps", "1", "--device", "cpu", *settings]
    assert run_command(command) == 0
    capsys.readouterr()
    assert run_command(["export", str(run), "--to", "diffusers", "--out", str(out)]) == 2
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
