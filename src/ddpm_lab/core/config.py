"""What a run is: frozen dataclasses, checked on construction, saved as JSON, read from recipes in TOML.

The five groups are the groups of flags of `ddpm train` (`--training.batch-size 64`); a field's docstring is its help.
Nothing here imports torch, so that the command line answers at once.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, cast

from ddpm_lab.core.errors import require
from ddpm_lab.core.settings import SettingsGroup, read_toml

RECIPES = {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.toml"))}  # packaged
Schedule = Literal["linear", "cosine"]
Prediction = Literal["eps", "x_0", "v", "edm"]
NoiseLevels = Literal["uniform", "lognormal"]
Weighting = Literal["simple", "min_snr", "learned"]
Conditioning = Literal["shift", "scale_shift"]
Precision = Literal["auto", "float32", "bf16"]
Compile = Literal["auto", "yes", "no"]
OptimizerName = Literal["adam", "muon"]
Decay = Literal["constant", "linear", "cosine"]
Sampler = Literal["ddim", "ddpm", "dpmpp", "heun"]
Spacing = Literal["uniform", "quadratic", "logsnr"]
Variance = Literal["beta", "beta_tilde"]
Features = Literal["classifier", "inception"]
Engine = Literal["torch", "compile"]
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
        """The standard deviation of x_t where alpha_bar is left of the image's variance; of the argument's type."""
        return (alpha_bar * self.sigma_data**2 + (1 - alpha_bar)) ** 0.5


Predicted = Literal["eps", "x_0", "v"] | EDM  # what functions take: EDM comes with the deviation of its images


@dataclass(frozen=True, kw_only=True)
class DataConfig(SettingsGroup):
    """Which images."""

    dataset: str = "mnist"
    """mnist, cifar10, digits, or the path of a folder of images"""
    horizontal_flip: bool = False
    """mirror each training image with probability 1/2 (right for CIFAR-10, wrong for digits)"""
    image_size: int | None = None
    """side in pixels to which the images of a folder are cropped and scaled; unset: they all have one size already"""

    def _check(self) -> None:
        require(self.dataset != "", "data.dataset must name a data set or a folder, and is empty")
        self._at_least(1, "image_size")
        self._at_most(4096, "image_size")
        require(
            self.image_size is None or self.dataset not in ("mnist", "cifar10", "digits"),
            f"data.image_size applies to a folder of images; {self.dataset} has its own size",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(SettingsGroup):
    """The U-Net of Ho et al. 2020, appendix B."""

    base_channels: int = 128
    """channels of the first level, a multiple of 4 and of norm_groups"""
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 2)
    """channels of each level, as multiples of the base; each level after the first halves the resolution"""
    num_blocks: int = 2
    """residual blocks per level on the way down (one more on the way up)"""
    attention_levels: tuple[int, ...] = (1,)
    """levels with self-attention after each block, counted from 0; the middle always has it"""
    attention_head_channels: int | None = None
    """channels per attention head; unset: one head"""
    dropout: float = 0.1
    """probability of dropout inside the residual blocks"""
    norm_groups: int = 32
    """groups of the normalisations; give narrow networks fewer: a level of one channel a group cannot see t"""
    patch_size: int = 1
    """side in pixels of patches folded into channels at the input, unfolded at the output; 2 is about 4x cheaper"""
    time_conditioning: Conditioning = "shift"
    """how time and class act in a residual block: added before the second normalisation (shift, Ho et al. 2020), or as
    a scale and a shift after it (scale_shift, Dhariwal and Nichol 2021)"""
    num_classes: int | None = None
    """classes that the network is told, as many as the data set has (mnist, cifar10 and digits 10 each); unset: none"""

    def _check(self) -> None:
        self._at_least(1, "num_blocks", "attention_head_channels", "norm_groups", "patch_size")
        self._at_least(2, "num_classes")
        self._at_most(100_000, "num_classes")
        self._at_most(64, "num_blocks", "patch_size")
        self._at_most(4096, "base_channels")
        require(
            self.base_channels >= 4 and self.base_channels % 4 == 0 and self.base_channels % self.norm_groups == 0,
            f"model.base_channels must be a positive multiple of 4 and of model.norm_groups ({self.norm_groups}), "
            f"not {self.base_channels}",
        )
        levels = len(self.channel_multipliers)
        require(
            1 <= levels <= 8 and all(1 <= m <= 64 for m in self.channel_multipliers),
            f"model.channel_multipliers must be 1 to 8 whole numbers from 1 to 64, not {self.channel_multipliers}",
        )
        require(
            all(0 <= level < levels for level in self.attention_levels),
            f"model.attention_levels must lie in 0..{levels - 1}, not {self.attention_levels}",
        )
        require(0 <= self.dropout < 1, f"model.dropout must be in [0, 1), not {self.dropout}")
        head = self.attention_head_channels
        if head is not None:
            widths = {self.base_channels * self.channel_multipliers[i] for i in (*self.attention_levels, levels - 1)}
            bad = sorted(w for w in widths if w % head)
            require(not bad, f"model.attention_head_channels of {head} does not divide the {bad[:1]} channels there")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(SettingsGroup):
    """The forward process and what the network predicts."""

    num_timesteps: int = 1000
    """T, the length of the chain, from 2 to 10,000"""
    schedule: Schedule = "linear"
    """linear (Ho et al. 2020) or cosine (Nichol and Dhariwal 2021)"""
    rescale_betas: bool | None = None
    """linear only: scale 1e-4 .. 0.02 by 1000/T, so that every T is nearly the same process (default), or not"""
    prediction: Prediction = "eps"
    """what the network predicts: the noise (eps, Algorithm 1), the clean image (x_0), v (Salimans and Ho 2022), or the
    combination of both that has variance 1 at every noise level (edm, Karras et al. 2022)"""
    sigma_data: float | None = None
    """edm only: standard deviation of the pixels on the scale of -1 to 1; unset: measured on the training images"""

    def _check(self) -> None:
        check_chain(self.num_timesteps, self.schedule, self.rescale_betas)
        require(
            self.sigma_data is None or self.prediction == "edm",
            f"diffusion.sigma_data is for the prediction edm, not for {self.prediction}",
        )
        require(
            self.sigma_data is None or 0 < self.sigma_data <= 100,
            f"diffusion.sigma_data must be above 0 and at most 100, not {self.sigma_data}",
        )
        if self.schedule == "linear" and self.rescale_betas is None:
            object.__setattr__(self, "rescale_betas", True)  # the resolved value is what is saved

    @property
    def predicted(self) -> Predicted:
        """The prediction as functions take it.

        Raises:
            InputError: edm, and sigma_data is not known yet.
        """
        if self.prediction != "edm":
            return self.prediction
        require(self.sigma_data is not None, "the prediction edm needs diffusion.sigma_data")
        return EDM(cast(float, self.sigma_data))

    @property
    def beta_convention(self) -> str:
        """The label every result carries: 'rescaled', 'fixed range' or 'cosine'."""
        if self.schedule == "cosine":
            return "cosine"
        return "rescaled" if self.rescale_betas else "fixed range"


def check_chain(num_timesteps: int, schedule: str, rescale_betas: bool | None) -> None:
    """Refuse, by name, a chain that cannot exist.

    Raises:
        InputError: T outside 2 .. 10,000; rescaled linear betas at T <= 20 (the last would be 1 or more);
            `rescale_betas` given for the cosine schedule, which has no such choice.
    """
    require(
        isinstance(num_timesteps, int) and 2 <= num_timesteps <= 10_000,
        f"diffusion.num_timesteps must be a whole number from 2 to 10000, not {num_timesteps}",
    )
    if schedule == "cosine":
        require(
            rescale_betas is None,
            "diffusion.rescale_betas does not apply to the cosine schedule, which is defined for every T; leave it out",
        )
    elif rescale_betas is not False:
        require(
            num_timesteps > 20,
            f"diffusion.num_timesteps of {num_timesteps} with rescaled linear betas would need a beta of "
            f"{20 / num_timesteps:g}; take more than 20, --diffusion.no-rescale-betas, or the cosine schedule",
        )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(SettingsGroup):
    """Algorithm 1 and how long."""

    num_steps: int = 800_000
    """optimiser steps in all"""
    batch_size: int = 128
    """images per step"""
    optimizer: OptimizerName = "adam"
    """adam, or muon (Jordan et al. 2024) for the hidden kernels with Adam for the rest, at one learning rate"""
    learning_rate: float = 2e-4
    """after the warm-up"""
    warmup_steps: int = 5_000
    """steps over which the learning rate rises linearly from 0; cut to num_steps"""
    decay: Decay = "constant"
    """the learning rate after the warm-up: constant, or falling to 0 at num_steps, along a line or a cosine"""
    decay_share: float = 1.0
    """with a decay: share of the steps after the warm-up in which the learning rate falls, the last ones"""
    adam_beta2: float = 0.999
    """decay per step of Adam's average of squared gradients"""
    ema_decay: float = 0.9999
    """decay per step of the moving average of the parameters; early on it is (1 + k) / (10 + k)"""
    class_dropout: float = 0.1
    """with model.num_classes: probability that an image's class is withheld, as guidance needs"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this Euclidean norm"""
    noise_levels: NoiseLevels = "uniform"
    """how timesteps are drawn: uniform in t (Algorithm 1), or nine tenths of them so that the logarithm of the noise
    level sigma = sqrt((1 - alpha_bar) / alpha_bar) is normal (lognormal, Karras et al. 2022)"""
    log_sigma_mean: float = -1.2
    """lognormal only: mean of ln sigma"""
    log_sigma_std: float = 1.2
    """lognormal only: standard deviation of ln sigma"""
    weighting: Weighting = "simple"
    """how losses are weighed: all alike (simple), by min(SNR, 5) on the clean image (min_snr, Hang et al. 2023), or by
    one over the mean loss at their noise level, as measured so far (learned, after Karras et al. 2024)"""
    precision: Precision = "auto"
    """bf16 computes convolutions, products and attention in bfloat16, the rest in float32; auto: where the device is
    fast at it"""
    compile: Compile = "auto"
    """whether torch.compile makes kernels for the network, which takes a minute or more first; auto: on a GPU"""
    seed: int = 0
    """of everything random in training"""
    log_every: int = 100
    """steps between lines of log.jsonl"""
    checkpoint_every: int = 5_000
    """steps between checkpoints"""
    keep_checkpoints: int = 3
    """how many of the newest checkpoints stay; 0: all"""

    def _check(self) -> None:
        self._at_least(1, "num_steps", "batch_size", "log_every", "checkpoint_every")
        self._at_least(0, "warmup_steps", "keep_checkpoints", "seed")
        self._at_most(65_536, "batch_size")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            require(value > 0, f"training.{name} must be above 0, not {value}")
        require(0 <= self.class_dropout <= 1, f"training.class_dropout must be in [0, 1], not {self.class_dropout}")
        for name in ("ema_decay", "adam_beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"training.{name} must be in [0, 1), not {value}")
        share = self.decay_share
        require(0 < share <= 1, f"training.decay_share must be above 0 and at most 1, not {share}")
        require(
            abs(self.log_sigma_mean) <= 10 and 0 < self.log_sigma_std <= 10,
            "training.log_sigma_mean must be from -10 to 10, and training.log_sigma_std above 0 and at most 10, not "
            f"{self.log_sigma_mean} and {self.log_sigma_std}",
        )
        object.__setattr__(self, "warmup_steps", min(self.warmup_steps, self.num_steps))


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(SettingsGroup):
    """What is looked at while training goes on; none of it changes the weights."""

    validate_every: int = 5_000
    """steps between validation losses (the averaged weights, fixed t and eps)"""
    validation_images: int = 1_000
    """held-out images in each validation loss"""
    sample_every: int = 5_000
    """steps between sample grids, always of the same seeds"""
    sample_images: int = 64
    """images in a sample grid"""
    sample_steps: int = 50
    """DDIM steps of a sample grid, and of images that are scored"""
    score_every: int = 0
    """steps between scores (Frechet distance, Inception Score, KID) in scores.jsonl; 0: none"""
    score_images: int = 1_000
    """images sampled for each score; so few that scores compare with each other only"""
    score_features: Features = "classifier"
    """the network that scores are taken over: that of the data set, or Inception"""
    tracker: Tracker = "none"
    """tensorboard or wandb also get the log, scores, grids and at last a film (pip install 'ddpm-lab[trackers]')"""

    def _check(self) -> None:
        self._at_least(1, "validate_every", "validation_images", "sample_every", "sample_images", "sample_steps")
        self._at_least(0, "score_every")
        self._at_least(20, "score_images")
        self._at_most(16_384, "sample_images")
        self._at_most(50_000, "score_images")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(SettingsGroup):
    """How images are drawn from a trained network."""

    _grouped = False  # its flags stand without a group
    sampler: Sampler = "ddim"
    """ddim (Song et al. 2020), ddpm (Algorithm 2 of Ho et al. 2020; best with all T), dpmpp (DPM-Solver++ of second
    order; fewest evaluations) or heun (Karras et al. 2022)"""
    num_steps: int | None = None
    """steps, each one evaluation of the network, two for heun; unset: 50 for ddim, all T for ddpm, 20 for dpmpp, 10
    for heun"""
    eta: float | None = None
    """ddim and dpmpp: noise added on the way, from 0 (none, the default) to 1 (for ddim: as ddpm with beta_tilde)"""
    spacing: Spacing | None = None
    """which timesteps fewer than T steps visit: even in t (uniform), denser near the image (quadratic), even in the
    signal-to-noise ratio's logarithm (logsnr); unset: logsnr for dpmpp and heun, else uniform"""
    singlestep: bool = False
    """dpmpp only: two evaluations a step in place of the memory of the step before"""
    variance: Variance | None = None
    """ddpm only: of the noise added at each step; unset: with all T steps beta, or that of the
    pipeline the network was imported from; beta_tilde with fewer"""
    class_: tuple[int, ...] = ()
    """of a network that is told classes: the class of each image, or several to be taken in turn; unset: all in turn"""
    guidance: float | None = None
    """of such a network (Ho and Salimans 2022): 1 asks for the class (the default), more exaggerates it at the cost of
    variety and a second evaluation a step, 0 leaves the class out; with a guide: how far to go away from its answer"""
    guide: str | None = None
    """autoguidance (Karras et al. 2024) in place of the classifier-free kind: a worse network of the same process, such
    as an average that the run kept early (a folder in RUN/averages); give guidance too"""
    guidance_interval: tuple[float, ...] = ()
    """the lowest and the highest noise level sigma = sqrt((1 - alpha_bar) / alpha_bar) at which guidance acts
    (Kynkaanniemi et al. 2024); unset: at all"""
    seed: int = 0
    """image i of a seed is always the same image"""
    batch_size: int = 64
    """images at a time; in float32 images of two batch sizes may differ in the last bit, in bfloat16 a little more"""
    precision: Precision = "float32"
    """bf16 computes convolutions, products and attention in bfloat16, faster where the device has it, and images differ
    a little; auto: where the device is fast at it"""
    engine: Engine = "torch"
    """compile: kernels made by torch.compile, which takes a minute or more first and pays on a GPU"""

    def _check(self) -> None:
        self._at_least(1, "num_steps", "batch_size")
        self._at_least(0, "seed")
        self._at_most(65_536, "batch_size")
        require(self.eta is None or 0 <= self.eta <= 1, f"eta must be from 0 to 1, not {self.eta}")
        require(
            self.eta is None or self.sampler in ("ddim", "dpmpp"),
            f"eta applies to the samplers ddim and dpmpp, not to {self.sampler}",
        )
        require(not (self.eta and self.singlestep), "eta needs the memory of dpmpp; leave it out with singlestep")
        require(
            self.variance is None or self.sampler == "ddpm",
            f"variance applies to the ddpm sampler, not to {self.sampler}",
        )
        self._at_least(0, "guidance")
        self._at_most(100, "guidance")
        require(
            self.guide is None or self.guidance not in (None, 0, 1),
            "guide needs a guidance above 0 other than 1: how far to go away from what the guide says",
        )
        interval = self.guidance_interval
        require(
            len(interval) in (0, 2) and all(level >= 0 for level in interval) and list(interval) == sorted(interval),
            f"guidance_interval must be two noise levels from 0, the lower first, not {interval}",
        )
        require(
            not interval or self.guidance not in (None, 0, 1),
            "guidance_interval needs a guidance above 0 other than 1",
        )
        require(all(label >= 0 for label in self.class_), f"class must be whole numbers from 0, not {self.class_}")
        require(not (self.class_ and self.guidance == 0), "guidance 0 leaves the class out; give no class with it")
        require(
            not self.singlestep or self.sampler == "dpmpp",
            f"singlestep applies to the dpmpp sampler, not to {self.sampler}",
        )


@dataclass(frozen=True, kw_only=True)
class FewImagesConfig(SamplingConfig):
    """The same where a few images are shown: rows of a batch beyond those wanted would be computed for nothing."""

    batch_size: int = 8
    """images at a time; in float32 images of two batch sizes may differ in the last bit, in bfloat16 a little more"""


METRICS = ("fid", "is", "kid", "prdc", "memorisation")


@dataclass(frozen=True, kw_only=True)
class ScoringConfig(SettingsGroup):
    """Which scores, and how."""

    _grouped = False  # its flags stand without a group
    metrics: tuple[str, ...] = ("fid", "is", "kid", "prdc")
    """fid (Frechet distance), is (Inception Score), kid, prdc (precision, recall, density, coverage), memorisation"""
    is_splits: int = 10
    """parts whose Inception Scores are averaged, 10 in the literature"""
    kid_subsets: int = 100
    """pairs of random subsets that KID averages"""
    kid_subset_size: int | None = None
    """images in each; unset: the smaller of 1000 and the number of images"""
    bootstrap: int = 50
    """resamplings behind the 95 % intervals; 0: no intervals"""

    def _check(self) -> None:
        listed = tuple(metric for item in self.metrics for metric in item.split(","))  # "fid,is" is "fid", "is"
        object.__setattr__(self, "metrics", listed)
        unknown = [metric for metric in self.metrics if metric not in METRICS]
        require(
            bool(self.metrics) and not unknown,
            f"metrics must be some of {', '.join(METRICS)}, not {', '.join(map(repr, unknown)) or 'none'}",
        )
        self._at_least(1, "is_splits", "kid_subsets")
        self._at_least(2, "kid_subset_size")
        self._at_most(10_000, "kid_subsets", "is_splits", "bootstrap", "kid_subset_size")
        require(self.bootstrap == 0 or self.bootstrap >= 2, f"bootstrap must be 0 or from 2, not {self.bootstrap}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run, whole."""

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
        """Build from parsed JSON or TOML: a table per group, each optional.

        Raises:
            InputError: unknown group or setting, wrong type, value out of range.
        """
        require(isinstance(values, dict), f"a config must be a table of groups, not {type(values).__name__}")
        assert isinstance(values, dict)
        groups = {f.name: f.default_factory for f in dataclasses.fields(cls)}
        for name in values:
            require(name in groups, f"there is no group {name!r}; the groups are {', '.join(groups)}")
        return cls(**{name: cast(Any, groups[name]).from_dict(group) for name, group in values.items()})

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The settings as plain JSON values, a table per group; `from_dict` reads it back."""
        return cast(dict[str, dict[str, Any]], json.loads(json.dumps(dataclasses.asdict(self))))


def load_recipe(recipe: str) -> Config:
    """The configuration a recipe describes; see `read_toml` and `Config.from_dict` for what raises."""
    return Config.from_dict(read_toml("recipe", RECIPES, recipe)[1])
