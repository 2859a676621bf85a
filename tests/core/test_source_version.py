"""Cached results are known by the code that made them: any change of an imported module makes them anew."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ddpm_lab
from ddpm_lab.core.source_version import FOLDERS, source_sha256

PACKAGE = Path(ddpm_lab.__file__).parent


@pytest.fixture
def copied(tmp_path):
    """A copy of the package's code, to be changed."""
    shutil.copytree(PACKAGE, tmp_path / "ddpm_lab", ignore=shutil.ignore_patterns("__pycache__", "weights"))
    return tmp_path / "ddpm_lab"


@pytest.mark.parametrize("folder", ["sampling", "evaluation"])
def test_the_hash_changes_with_every_module_that_may_be_imported(copied, folder):
    before = source_sha256(folder)
    assert source_sha256(folder, copied) == before
    for name in FOLDERS:
        for path in sorted((copied / name).rglob("*.py")):
            text = path.read_text()
            path.write_text(text + "\n")
            source_sha256.cache_clear()
            changed = source_sha256(folder, copied) != before
            assert changed == (FOLDERS.index(name) <= FOLDERS.index(folder)), path
            path.write_text(text)
    (copied / "data" / "new.py").touch()
    source_sha256.cache_clear()
    assert source_sha256(folder, copied) != before


@pytest.mark.slow
def test_another_sampler_is_not_answered_from_the_cache(tiny_run, tmp_path):
    """The score of images by a sampler whose code was changed is another one, and that of the old code the old one."""
    shutil.copytree(PACKAGE, tmp_path / "code" / "ddpm_lab", ignore=shutil.ignore_patterns("__pycache__"))
    sampler = tmp_path / "code" / "ddpm_lab" / "diffusion" / "samplers.py"
    command = [sys.executable, "-m", "ddpm_lab", "evaluate", str(tiny_run), "--features", "classifier", "--json"]
    command += ["--metrics", "is", "--num-images", "20", "--num-steps", "3", "--scores", str(tmp_path / "s.jsonl")]
    places = {"PYTHONPATH": str(tmp_path / "code"), "DDPM_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    def score():
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | places, check=True)
        return re.search(r'"inception_score": \{"value": ([0-9.]+)', done.stdout)[1]

    first, text = score(), sampler.read_text()
    line = "x_s = alpha_bar_s**0.5 * x_0_hat"
    assert line in text
    sampler.write_text(text.replace(line, "x_s = 0.5 * alpha_bar_s**0.5 * x_0_hat"))
    assert score() != first
    sampler.write_text(text)
    assert score() == first
