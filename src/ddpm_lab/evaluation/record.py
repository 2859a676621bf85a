"""The schema of a score record: the line that `ddpm evaluate --json` prints and that `scores.jsonl` holds.

`ScoreRecord` is a whole record, and `TrainingRecord` one that a run adds; the other types are their parts. The
docstrings below are the source of `docs/record.md`. Records that older versions wrote may lack fields.
"""

from typing import Any, Generic, NotRequired, TypedDict, TypeVar

Value = TypeVar("Value")


class Interval(TypedDict):
    """A score and its 95 % interval, which covers the choice of images but not the training seed."""

    value: float
    """estimate from all images"""
    low: float | None
    """lower end of the interval; null without a bootstrap"""
    high: float | None
    """upper end of the interval; null without a bootstrap"""


class Scores(TypedDict, Generic[Value]):
    """The scores. A score that was not asked for is null. The sources are those of the functions that compute them."""

    fid: Value
    """Frechet distance between generated and reference images, at least 0; `fid_label` gives its name"""
    fid_extrapolated: Value
    """Frechet distance extrapolated to infinitely many images; null below 10 images per feature"""
    inception_score: Value
    """Inception Score, mean over `scoring.is_splits` parts, from 1 to `features.num_classes`"""
    inception_score_whole: Value
    """Inception Score of all images together"""
    kid: Value
    """KID, the squared maximum mean discrepancy; slightly below 0 at times, for the estimate is unbiased"""
    mind: Value
    """MIND, a sliced Wasserstein distance to equally many reference images, at least 0"""
    precision: Value
    """share of generated images inside the neighbourhoods of real ones (quality), in [0, 1]"""
    recall: Value
    """share of real images inside the neighbourhoods of generated ones (variety), in [0, 1]"""
    density: Value
    """mean number of real neighbourhoods that a generated image lies in, over k = 3; may exceed 1"""
    coverage: Value
    """share of real images whose neighbourhood holds a generated image, in [0, 1]"""


class Floor(Scores[float | None]):
    """The ten scores, as numbers or null, of real images outside the reference: those of a perfect generator."""

    images: str
    """name of these images"""
    num_images: int
    """how many they are: as many as are scored, or all that there are"""


class Images(TypedDict):
    """The images that were scored."""

    name: str
    """as the user named them, or 'images of MODEL'"""
    sha256: str
    """SHA-256 of shape and pixels"""
    drawn_from: int | None
    """size of the collection that they were drawn from at random; null: they are all of it"""


class ReferenceImages(TypedDict):
    """What the images were compared with."""

    name: str
    """as the user named it"""
    dataset: str | None
    """mnist, cifar10 or digits; null: other images"""
    split: str | None
    """train or test; null: other images"""
    num_images: int | None
    """how many; null: statistics from a file"""
    sha256: str
    """SHA-256 of shape and pixels, or of the file of statistics"""


class NetworkDetails(TypedDict, total=False):
    """What only some feature networks have."""

    test_accuracy: float
    """share of test images that a classifier labels correctly"""
    layer: str
    """layer of Inception: 2048, or an earlier one"""


class FeatureNetworkRecord(NetworkDetails):
    """The network that computed the features."""

    name: str
    """inception, dinov2, classifier (DATASET), or the name of a module"""
    sha256: str
    """SHA-256 of its weights"""
    library: str
    """package that the network comes from"""
    version: str
    """version of that package"""
    num_features: int
    """features per image"""
    num_classes: int | None
    """number of logits; null: the network has none"""


class Classes(TypedDict):
    """How the classifier labels the images."""

    shares: list[float]
    """share of the images in each class"""
    sure: float
    """share of the images whose class has a probability above `sure_above`"""
    sure_above: float
    """that probability"""
    as_asked: NotRequired[float]
    """share of the images labelled as the class that they were conditioned on"""


class Memorisation(TypedDict):
    """How many images lie close to a training image, see `neighbours.memorisation`. Distances are between features."""

    nearer_than_test: float
    """share of images nearer to a training image than 99 % of the held-out images are, in [0, 1]"""
    nearer_than_test_low: float | None
    """lower end of its 95 % interval"""
    nearer_than_test_high: float | None
    """upper end of its 95 % interval"""
    expected: float
    """mean of `nearer_than_test` for images distributed as the held-out ones"""
    expected_low: float
    """lower end of the range that holds that share in 95 of 100 draws"""
    expected_high: float
    """upper end of that range"""
    much_nearer: float
    """share of images at less than half the distance from their training image to its nearest training neighbour"""
    much_nearer_low: float | None
    """lower end of its 95 % interval"""
    much_nearer_high: float | None
    """upper end of its 95 % interval"""
    threshold: float
    """distance that 1 % of the held-out images are nearer than"""
    median_distance: float
    """median distance of the images to their nearest training image"""
    median_distance_of_test: float
    """median distance of the held-out images to theirs"""
    closest: list[list[int | float]]
    """the 16 closest images, each as [index, index of its training image, distance]"""


class Findings(TypedDict, total=False):
    """What only some records have."""

    classes: Classes
    """how a classifier labels the images; with classifier features only"""
    memorisation: Memorisation
    """how many images are close to training images; where asked for"""


class Evaluation(Scores[Interval | None], Findings):
    """What `ddpm_lab.evaluate` returns: the scores and what they depend on, without the model."""

    fid_label: str
    """name of the Frechet distance: FID over the official Inception network only, FD-DINOv2 over the official DINOv2;
    with n below 50,000 images"""
    num_images: int
    """how many images were scored"""
    images: Images
    """the images that were scored"""
    reference: ReferenceImages | None
    """what they were compared with; null: nothing"""
    features: FeatureNetworkRecord
    """the network that computed the features"""
    floor: Floor | None
    """scores of real images outside the reference; null: there are none"""
    scoring: dict[str, Any]
    """settings of the scores: metrics, is_splits, kid_subsets, kid_subset_size, mind_directions, bootstrap"""
    versions: dict[str, str]
    """versions of ddpm-lab, torch, numpy, torch-fidelity and python"""


class Guide(TypedDict):
    """The network of autoguidance."""

    name: str
    """as the user named it"""
    step: int
    """training steps"""
    sha256: str
    """SHA-256 of its weights"""
    revision: str | None
    """commit on the hub; null: it is not from there"""


class Sampled(TypedDict):
    """The model and its sampler."""

    step: int | None
    """training steps of the model"""
    weights: str | None
    """ema (averaged) or raw"""
    weights_sha256: str | None
    """SHA-256 of the weights' file"""
    revision: str | None
    """commit of the model on the hub; null: it is not from there"""
    sampler: str | None
    """ddim, ddpm, dpmpp, heun, ipndm or unipc"""
    num_steps: int | None
    """sampling steps"""
    num_evaluations: int | None
    """evaluations of the network per image, with those of guidance"""
    eta: float | None
    """noise of ddim and dpmpp, from 0 to 1"""
    spacing: str | None
    """which timesteps the steps visit: uniform, quadratic, logsnr or karras"""
    singlestep: bool | None
    """whether dpmpp took two evaluations per step"""
    variance: str | None
    """reverse variance of ddpm: beta or beta_tilde"""
    num_timesteps: int | None
    """T, the length of the training chain"""
    schedule: str | None
    """linear or cosine"""
    beta_convention: str | None
    """how the betas depend on T, see `DiffusionConfig.beta_convention`"""
    seed: int | None
    """seed of the samples"""
    batch_size: int | None
    """images per batch"""
    dtype: str | None
    """precision of the network: float32 (on GPUs never TF32), bf16 or fp16"""
    engine: str | None
    """torch or compile"""


ConditionedOn = TypedDict("ConditionedOn", {"class": list[int] | None})
"""numbers of the classes that images were conditioned on, in turn; null: all classes, or none"""


class ClassNames(TypedDict):
    """The names of the classes."""

    class_names: list[str] | None
    """names of the classes that images were conditioned on, in turn; null: none"""


class Guidance(TypedDict):
    """Guidance, classifier-free or by a guide."""

    guidance: float | None
    """guidance scale; 1: none"""
    guide: Guide | None
    """the network of autoguidance"""
    guidance_interval: list[float] | None
    """lowest and highest noise level with guidance; null: all levels"""


class SamplingRecord(Sampled, ConditionedOn, ClassNames, Guidance):
    """The model and how it was sampled; all fields are null where images were scored that existed before."""


class SourceScores(Evaluation, SamplingRecord):
    """The scores of a model or of images."""

    source: str
    """model or images, as the user named them"""


class TimedScores(SourceScores):
    """Those scores with how they were computed."""

    device: str
    """device that computed the scores"""
    seconds: float
    """wall-clock time of sampling and scoring, by all feature networks of the command"""


class ScoreRecord(TimedScores):
    """A record of `ddpm evaluate`, which prints one for each feature network. The scores come first; a score that was
    not asked for, or that the network has no classes for, is null."""

    image_size: int | None
    """side in pixels to which the images of folders were scaled; null: their own size"""


class TrainingRecord(TimedScores):
    """A record that a run adds while it trains: the fields of a `ScoreRecord` but `image_size`, and one more."""

    by: str
    """'training'"""
