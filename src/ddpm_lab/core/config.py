"""The settings of a run and of sampling: frozen dataclasses, saved as JSON, read from recipes in TOML.

The five groups of `Config` are the groups of flags of `ddpm train` (`--training.batch-size 64`). The docstring of a
field is the help of its flag. Nothing here imports torch, so that the command line starts quickly.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from ddpm_lab.core.errors import InputError, require
from ddpm_lab.core.settings import Range, SettingsGroup, read_toml

RECIPES = {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.toml"))}  # packaged
Prediction = Literal["eps", "x_0", "v", "edm"]
Conditioning = Literal["shift", "scale_shift"]
Precision = Literal["auto", "float32", "bf16", "fp16"]
Sampler = Literal["ddim", "ddpm", "dpmpp", "heun", "ipndm", "unipc", "tuned"]
Spacing = Literal["uniform", "leading", "quadratic", "logsnr", "karras"]
Variance = Literal["beta", "beta_tilde"]
Features = Literal["classifier", "inception"]
Tracker = Literal["none", "tensorboard", "wandb"]


@dataclass(frozen=True)
class EDM:
    """The preconditioning of Karras et al. 2022 (arXiv:2206.00364, table 1).

    Args:
        sigma_data: standard deviation of the images' pixels, on the scale of -1 to 1.
    Raises:
        InputError: sigma_data is not above 0.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        require(self.sigma_data > 0, f"sigma_data must be above 0, not {self.sigma_data}")

    def deviation(self, alpha_bar: Any) -> Any:
        """The standard deviation of x_t at a given alpha_bar (a number, an array or a tensor), of the same type."""
        return (alpha_bar * self.sigma_data**2 + (1 - alpha_bar)) ** 0.5


Predicted = Literal["eps", "x_0", "v"] | EDM  # the argument of functions: EDM carries its sigma_data


@dataclass(frozen=True, kw_only=True)
class DataConfig(SettingsGroup):
    """The training images."""

    dataset: str = "mnist"
    """mnist, cifar10, digits, or the path of a folder of images; with a folder in it for each class, it has classes"""
    horizontal_flip: bool = False
    """mirror each training image with probability 1/2 (right for CIFAR-10, wrong for digits)"""
    image_size: Annotated[int | None, Range(1, 4096)] = None
    """side in pixels to which the images of a folder are cropped and scaled; unset: all images have one size already"""

    def _check(self) -> None:
        require(self.dataset != "", "data.dataset must name a data set or a folder, and is empty")
        require(
            self.image_size is None or self.dataset not in ("mnist", "cifar10", "digits"),
            f"data.image_size applies to a folder of images; {self.dataset} has its own size",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(SettingsGroup):
    """The U-Net of Ho et al. 2020, appendix B."""

    base_channels: Annotated[int, Range(4, 4096)] = 128
    """channels of the first level, a multiple of 4 and of norm_groups"""
    channel_multipliers: Annotated[tuple[int, ...], Range(1, 64)] = (1, 2, 2, 2)
    """channels of each level, as multiples of base_channels; each level after the first halves the resolution"""
    num_blocks: Annotated[int, Range(1, 64)] = 2
    """residual blocks per level on the way down (one more on the way up)"""
    attention_levels: Annotated[tuple[int, ...], Range(0)] = (1,)
    """levels with self-attention after each block, counted from 0; the middle always has it"""
    attention_head_channels: Annotated[int | None, Range(1)] = None
    """channels per attention head; unset: one head"""
    dropout: Annotated[float, Range(0, 1, open_high=True)] = 0.1
    """probability of dropout inside the residual blocks"""
    norm_groups: Annotated[int, Range(1)] = 32
    """groups of each group normalisation; must be fewer than the channels of every level, or that level ignores the
    timestep"""
    patch_size: Annotated[int, Range(1, 64)] = 1
    """side in pixels of the patches that are folded into channels at the input and unfolded at the output; 2 makes the
    network about 4 times cheaper"""
    time_conditioning: Conditioning = "shift"
    """how the embedding of timestep and class enters a residual block: added before the second normalisation (shift, Ho
    et al. 2020), or as a scale and a shift after it (scale_shift, Dhariwal and Nichol 2021)"""
    num_classes: Annotated[int | Literal["auto"] | None, Range(2, 100_000)] = None
    """number of classes of a conditional network, as many as the data set has: 10 for mnist, cifar10 and digits, for a
    folder the number of its folders of images; auto: that number, or unset for a data set without classes; unset: an
    unconditional network"""
    num_positions: Annotated[int, Range(2, 10_000)] = 1000
    """the network takes timesteps as positions from 0 to num_positions - 1 on the scale of noise, whatever T is; as
    many as T: the timesteps themselves, as networks of diffusers do"""
    downsample_padding: Annotated[int, Range(0, 1)] = 0
    """zeros around the input of a strided convolution: at the right and the bottom only (0, Ho et al. 2020), or on all
    sides (1, the default of diffusers)"""
    flip_sin_to_cos: bool = False
    """time embedding: cosines before sines, as is the default of diffusers"""
    freq_shift: Annotated[int, Range(0, 1)] = 1
    """time embedding: frequencies from 1 down to 1/10000 (1, Ho et al. 2020), or to just above it (0, the default of
    diffusers)"""
    norm_eps: Annotated[float, Range(0, 1, open_low=True)] = 1e-6
    """number added to the variance in each group normalisation; the default of diffusers is 1e-5"""

    def _check(self) -> None:
        require(
            self.base_channels % 4 == 0 and self.base_channels % self.norm_groups == 0,
            f"model.base_channels must be a multiple of 4 and of model.norm_groups ({self.norm_groups}), "
            f"not {self.base_channels}",
        )
        levels = len(self.channel_multipliers)
        require(1 <= levels <= 8, f"model.channel_multipliers must be 1 to 8 numbers, not {levels}")
        require(
            max(self.attention_levels, default=0) < levels,
            f"model.attention_levels must be from 0 to {levels - 1}, not {self.attention_levels}",
        )
        if self.attention_head_channels is not None:
            for level in (*self.attention_levels, levels - 1):
                channels = self.base_channels * self.channel_multipliers[level]
                require(
                    channels % self.attention_head_channels == 0,
                    f"model.attention_head_channels must divide the {channels} channels of level {level}, which "
                    f"{self.attention_head_channels} does not",
                )

    @property
    def class_count(self) -> int | None:
        """The number of classes; None for an unconditional network.

        Raises:
            InputError: it is auto, which only the data set can tell.
        """
        if self.num_classes == "auto":
            raise InputError("model.num_classes is auto and no data set is read here; give the number")
        return self.num_classes


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(SettingsGroup):
    """The forward process, and what the network predicts."""

    num_timesteps: Annotated[int, Range(2, 10_000)] = 1000
    """T, the number of timesteps of the chain, from 2 to 10,000"""
    schedule: Literal["linear", "cosine"] = "linear"
    """noise schedule: linear (Ho et al. 2020) or cosine (Nichol and Dhariwal 2021)"""
    rescale_betas: bool | None = None
    """linear only: multiply the range 1e-4 .. 0.02 of the betas by 1000/T, so that the process is nearly the same for
    every T (the default)"""
    prediction: Prediction = "eps"
    """output of the network: the noise (eps, Algorithm 1), the clean image (x_0), v (Salimans and Ho 2022), or the
    combination of both that has variance 1 at every noise level (edm, Karras et al. 2022)"""
    sigma_data: Annotated[float | None, Range(0, 100, open_low=True)] = None
    """edm only: standard deviation of the pixels on the scale of -1 to 1; unset: measured on the training images"""

    def _check(self) -> None:
        require(
            self.sigma_data is None or self.prediction == "edm",
            f"diffusion.sigma_data applies to the prediction edm, not to {self.prediction}",
        )
        if self.schedule == "cosine":
            require(
                self.rescale_betas is None,
                "diffusion.rescale_betas does not apply to the cosine schedule, which is defined for every T; omit it",
            )
        elif self.rescale_betas is not False:
            object.__setattr__(self, "rescale_betas", True)  # the resolved value is what is saved
            require(
                self.num_timesteps > 20,
                f"diffusion.num_timesteps of {self.num_timesteps} with rescaled linear betas would need a beta of "
                f"{20 / self.num_timesteps:g}; use more than 20 timesteps, --diffusion.no-rescale-betas, or the cosine "
                "schedule",
            )

    @property
    def predicted(self) -> Predicted:
        """The prediction in the form that functions take.

        Raises:
            InputError: the prediction is edm, and sigma_data is unset.
        """
        if self.prediction != "edm":
            return self.prediction
        if self.sigma_data is None:
            raise InputError("the prediction edm requires diffusion.sigma_data")
        return EDM(self.sigma_data)

    @property
    def beta_convention(self) -> str:
        """The label that every result carries: 'rescaled', 'fixed range' or 'cosine'."""
        if self.schedule == "cosine":
            return "cosine"
        return "rescaled" if self.rescale_betas else "fixed range"


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(SettingsGroup):
    """The training loop (Algorithm 1 of Ho et al. 2020)."""

    num_steps: Annotated[int, Range(1)] = 800_000
    """number of optimiser steps"""
    batch_size: Annotated[int, Range(1, 65_536)] = 128
    """images per step"""
    optimizer: Literal["adam", "muon"] = "adam"
    """adam, or muon (Jordan et al. 2024) for the hidden kernels with Adam for the rest, at one learning rate"""
    learning_rate: Annotated[float, Range(0, open_low=True)] = 2e-4
    """learning rate after the warm-up"""
    warmup_steps: Annotated[int, Range(0)] = 5_000
    """steps over which the learning rate rises linearly from 0; at most num_steps"""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """learning rate after the warm-up: constant, or falling to 0 at num_steps along a line or a cosine"""
    decay_share: Annotated[float, Range(0, 1, open_low=True)] = 1.0
    """linear and cosine decay only: fraction of the steps after the warm-up, at their end, in which the learning rate
    falls"""
    adam_beta2: Annotated[float, Range(0, 1, open_high=True)] = 0.999
    """decay per step of Adam's average of squared gradients"""
    ema_decay: Annotated[float, Range(0, 1, open_high=True)] = 0.9999
    """decay per step of the moving average of the parameters; at most (1 + k) / (10 + k) at step k"""
    class_dropout: Annotated[float, Range(0, 1)] = 0.1
    """conditional networks only: probability that the label of an image is dropped, which guidance requires"""
    max_grad_norm: Annotated[float, Range(0, open_low=True)] = 1.0
    """gradients with a larger Euclidean norm are scaled down to this norm"""
    noise_levels: Literal["uniform", "lognormal"] = "uniform"
    """distribution of timesteps: uniform in t (Algorithm 1), or for nine tenths of the draws such that the logarithm of
    the noise level sigma = sqrt((1 - alpha_bar) / alpha_bar) is normal (lognormal, Karras et al. 2022)"""
    log_sigma_mean: Annotated[float, Range(-10, 10)] = -1.2
    """lognormal only: mean of ln sigma"""
    log_sigma_std: Annotated[float, Range(0, 10, open_low=True)] = 1.2
    """lognormal only: standard deviation of ln sigma"""
    weighting: Literal["simple", "min_snr", "learned"] = "simple"
    """weights of the losses: equal (simple), min(SNR, 5) on the clean image (min_snr, Hang et al. 2023), or one over
    the mean loss at the same noise level, as measured so far (learned, after Karras et al. 2024)"""
    precision: Precision = "auto"
    """bf16 and fp16 compute convolutions, products and attention in bfloat16 or float16 and the rest in float32; fp16
    scales the loss, and skips steps whose gradients overflow; auto: bf16 where the device has fast instructions for it,
    fp16 on CUDA cards that have them for float16 alone (V100, T4, RTX 20), else float32"""
    compile: Literal["auto", "yes", "no"] = "auto"
    """whether to compile the network with torch.compile, which takes a minute or more at the start; auto: no"""
    deterministic: bool = False
    """on a GPU: use deterministic algorithms only, so that a run that is stopped and continued on the same card ends in
    the same weights bit for bit; slower (a CPU needs no such setting)"""
    seed: Annotated[int, Range(0)] = 0
    """seed of all randomness in training"""
    log_every: Annotated[int, Range(1)] = 100
    """steps between lines of log.jsonl"""
    checkpoint_every: Annotated[int, Range(1)] = 5_000
    """steps between checkpoints"""
    keep_checkpoints: Annotated[int, Range(0)] = 3
    """how many of the newest checkpoints are kept; 0: all"""

    def _check(self) -> None:
        object.__setattr__(self, "warmup_steps", min(self.warmup_steps, self.num_steps))


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(SettingsGroup):
    """Evaluation during training; none of it changes the weights."""

    validate_every: Annotated[int, Range(1)] = 5_000
    """steps between validation losses (averaged weights, fixed t and eps)"""
    validation_images: Annotated[int, Range(1)] = 1_000
    """held-out images in each validation loss"""
    sample_every: Annotated[int, Range(1)] = 5_000
    """steps between sample grids, always of the same seeds"""
    sample_images: Annotated[int, Range(1, 16_384)] = 64
    """images in a sample grid"""
    sample_steps: Annotated[int, Range(1)] = 50
    """DDIM steps for sample grids and for the images that are scored"""
    score_every: Annotated[int, Range(0)] = 0
    """steps between scores (Frechet distance, Inception Score, KID) in scores.jsonl; 0: no scores"""
    score_images: Annotated[int, Range(20, 50_000)] = 1_000
    """images sampled for each score; scores of fewer than 50,000 images compare only with each other"""
    score_features: Features = "classifier"
    """feature network of the scores: the classifier of the data set, or Inception"""
    tracker: Tracker = "none"
    """tensorboard or wandb: also send log, scores, sample grids and a final film there (requires
    pip install 'ddpm-lab[trackers]')"""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(SettingsGroup):
    """How images are sampled from a trained network."""

    _grouped = False  # its flags have no group
    sampler: Sampler = "ddim"
    """ddim (Song et al. 2020), ddpm (Algorithm 2 of Ho et al. 2020; best with all T steps), or for few steps dpmpp
    (DPM-Solver++ of second order, Lu et al. 2022), heun (Karras et al. 2022), ipndm (Zhang and Chen 2023), unipc (of
    third order, Zhao et al. 2023) or tuned (made for this model by ddpm tune)"""
    num_steps: Annotated[int | None, Range(1)] = None
    """number of steps, each one evaluation of the network, or two for heun; unset: 50 for ddim, all T for ddpm, 20 for
    dpmpp, the most that there is for tuned, 10 for the others"""
    eta: Annotated[float | None, Range(0, 1)] = None
    """ddim and dpmpp only: noise added during sampling, from 0 (none, the default) to 1 (for ddim: the same as ddpm
    with beta_tilde)"""
    spacing: Spacing | None = None
    """which timesteps are visited with fewer than T steps: even in t, to the noisiest (uniform) or from the least noisy
    (leading, the default of diffusers' DDIMScheduler), denser near the image (quadratic), even in the logarithm of the
    signal-to-noise ratio (logsnr), or even in the seventh root of the noise level sigma (karras, Karras et al. 2022);
    unset: uniform for ddpm and ddim, or for ddim that of the imported DDIM pipeline; for the others logsnr"""
    singlestep: bool = False
    """dpmpp only: two evaluations per step, instead of reusing the prediction of the previous step"""
    variance: Variance | None = None
    """ddpm only: variance of the noise added at each step; unset: with all T steps beta, or the variance of the
    imported pipeline; with fewer steps beta_tilde"""
    class_: Annotated[tuple[str | int, ...], Range(0)] = ()
    """conditional networks only: the class of every image by name or number, or several classes, used in turn; unset:
    all in turn"""
    guidance: Annotated[float | None, Range(0, 100)] = None
    """guidance scale (Ho and Salimans 2022): 1 samples the class (the default, but for packaged weights that name
    another), more follows the class more closely, with less variety and a second evaluation per step, 0 ignores the
    class; with a guide: how far to move away from the guide's prediction"""
    guide: str | None = None
    """autoguidance (Karras et al. 2024) instead of classifier-free guidance: a weaker network of the same process, such
    as an early average of the run (a folder in RUN/averages); requires a guidance scale"""
    guidance_interval: Annotated[tuple[float, ...], Range(0)] = ()
    """lowest and highest noise level sigma = sqrt((1 - alpha_bar) / alpha_bar) at which guidance is applied
    (Kynkaanniemi et al. 2024); unset: all noise levels"""
    seed: Annotated[int, Range(0)] = 0
    """seed of the noise; image i of a seed is always the same image"""
    batch_size: Annotated[int, Range(1, 65_536)] = 64
    """images per batch, at most as many as are asked for; in float32 another batch size may change the last bit of an
    image, in bfloat16 a little more"""
    precision: Precision = "float32"
    """bf16 and fp16 compute convolutions, products and attention in bfloat16 or float16, which is faster where the
    device supports it and changes images a little; auto: what the device has fast instructions for, bf16 first"""
    engine: Literal["torch", "compile"] = "torch"
    """compile: use torch.compile, which takes a minute or more at the start and makes sampling faster on a GPU"""

    def _check(self) -> None:
        for name, given, samplers in (
            ("eta", self.eta is not None, ("ddim", "dpmpp")),
            ("variance", self.variance is not None, ("ddpm",)),
            ("singlestep", self.singlestep, ("dpmpp",)),
            ("spacing", self.spacing is not None, ("ddim", "ddpm", "dpmpp", "heun", "ipndm", "unipc")),
        ):
            require(
                not given or self.sampler in samplers,
                f"{name} applies to {' and '.join(samplers)}, not to {self.sampler}",
            )
        require(not (self.eta and self.singlestep), "eta above 0 cannot be combined with singlestep")
        interval = self.guidance_interval
        require(
            len(interval) in (0, 2) and list(interval) == sorted(interval),
            f"guidance_interval must be two noise levels, the lower one first, not {interval}",
        )
        for name, given in (("guide", self.guide is not None), ("guidance_interval", bool(interval))):
            require(
                not given or self.guidance not in (None, 0, 1), f"{name} requires a guidance above 0 and other than 1"
            )
        require(not (self.class_ and self.guidance == 0), "guidance 0 ignores the class; omit the class")


@dataclass(frozen=True, kw_only=True)
class TuningConfig(SettingsGroup):
    """How a sampler is tuned (`ddpm tune`)."""

    _grouped = False  # its flags have no group
    num_steps: Annotated[tuple[int, ...], Range(1, 50)] = (4, 6, 8)
    """numbers of evaluations of the network, a sampler for each"""
    guidance: Annotated[float | None, Range(0, 100, open_low=True)] = None
    """guidance scale; unset: as in ddpm sample, 1 but for packaged weights that name another"""
    guide: str | None = None
    """model for autoguidance, as in ddpm sample"""
    guidance_interval: Annotated[tuple[float, ...], Range(0)] = ()
    """noise levels with guidance, as in ddpm sample"""
    num_images: Annotated[int, Range(1, 100_000)] = 512
    """images of the teacher (DPM-Solver++ with 50 steps) to learn from, one for each noise"""
    held_out: Annotated[int, Range(1, 100_000)] = 128
    """further images, which choose the best of the samplers on the way"""
    iterations: Annotated[int, Range(1, 1_000_000)] = 200
    """steps of learning for each sampler"""
    batch_size: Annotated[int, Range(1, 65_536)] = 16
    """images in each step of learning"""
    learning_rate: Annotated[float, Range(0, 1, open_low=True)] = 0.01
    """largest change of a coefficient in a step (Adam); it falls to 0"""
    seed: Annotated[int, Range(0)] = 0
    """seed of the noise"""
    precision: Precision = "auto"
    """as in ddpm sample"""

    def _check(self) -> None:
        require(len(self.num_steps) > 0, "num_steps must be at least one number")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        require(
            self.evaluation.sample_steps <= self.diffusion.num_timesteps,
            f"evaluation.sample_steps of {self.evaluation.sample_steps} exceeds "
            f"diffusion.num_timesteps of {self.diffusion.num_timesteps}",
        )

    @classmethod
    def from_dict(cls, values: object) -> Self:
        """Build from parsed JSON or TOML: a table for each group, each optional.

        Raises:
            InputError: an unknown group or setting, a wrong type, or a value out of range.
        """
        if not isinstance(values, dict):
            raise InputError(f"a config must be a table of groups, not {type(values).__name__}")
        groups = {f.name: cast(Any, f.type) for f in dataclasses.fields(cls)}
        for name in values:
            require(name in groups, f"there is no group {name!r}; the groups are {', '.join(groups)}")
        return cls(**{name: groups[name].from_dict(group) for name, group in values.items()})

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The settings as plain JSON values, a table for each group; `from_dict` reads it back."""
        return cast(dict[str, dict[str, Any]], json.loads(json.dumps(dataclasses.asdict(self))))


def load_recipe(recipe: str) -> Config:
    """Read the configuration of a packaged recipe or a TOML file.

    Raises:
        InputError: no such file, not TOML, an unknown setting, or a value out of range.
    """
    return Config.from_dict(read_toml("recipe", RECIPES, recipe)[1])
