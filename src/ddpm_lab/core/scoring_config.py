"""The settings of scores. Nothing here imports torch, so that the command line starts quickly."""

from dataclasses import dataclass
from typing import Annotated

from ddpm_lab.core.errors import require
from ddpm_lab.core.settings import Range, SettingsGroup

METRICS = ("fid", "is", "kid", "prdc", "mind", "memorisation")


@dataclass(frozen=True, kw_only=True)
class ScoringConfig(SettingsGroup):
    """Which scores are computed, and how."""

    _grouped = False  # its flags have no group
    metrics: tuple[str, ...] = ("fid", "is", "kid", "prdc")
    """fid (Frechet distance), is (Inception Score; not for dinov2, which has no classes), kid, prdc (precision, recall,
    density, coverage), mind (sliced Wasserstein distance), memorisation"""
    is_splits: Annotated[int, Range(1, 10_000)] = 10
    """parts whose Inception Scores are averaged, 10 in the literature"""
    kid_subsets: Annotated[int, Range(1, 10_000)] = 100
    """pairs of random subsets that KID averages over"""
    kid_subset_size: Annotated[int | None, Range(2, 10_000)] = None
    """images in each subset; unset: the smaller of 1000 and the number of images"""
    mind_directions: Annotated[int, Range(1, 100_000)] = 1000
    """random directions that MIND averages over"""
    bootstrap: Annotated[int, Range(0, 10_000)] = 50
    """bootstrap resamples for the 95 % intervals, at least 2; 0: no intervals"""

    def _check(self) -> None:
        listed = tuple(metric for item in self.metrics for metric in item.split(","))  # "fid,is" is "fid", "is"
        object.__setattr__(self, "metrics", listed)
        unknown = ", ".join(repr(metric) for metric in listed if metric not in METRICS)
        require(listed != () and not unknown, f"metrics must be some of {', '.join(METRICS)}, not {unknown or 'none'}")
        require(self.bootstrap != 1, "bootstrap must be 0 or at least 2, not 1")
