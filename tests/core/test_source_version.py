"""Cached results are known by the code that made them: any change of an imported module makes them anew."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ddpm_lab
from ddpm_lab.core.source_version import imported_modules, source_sha256

PACKAGE = Path(ddpm_lab.__file__).parent


@pytest.fixture
def copied(tmp_path):
    """A copy of the package's code, to be changed."""
    shutil.copytree(PACKAGE, tmp_path / "ddpm_lab", ignore=shutil.ignore_patterns("__pycache__", "weights"))
    return tmp_path / "ddpm_lab"


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("sampling.generation", ["diffusion.samplers", "diffusion.solvers", "diffusion.unet", "data.datasets"]),
        ("evaluation.feature_store", ["evaluation.metrics", "evaluation.classifier"]),
    ],
)
def test_a_change_in_any_imported_module_changes_the_hash(copied, module, expected):
    names, before = imported_modules(module), source_sha256(module)
    assert source_sha256(module, copied) == before
    assert set(expected) <= set(names)
    for name in names:
        path = copied.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        text = path.read_text()
        changed = re.sub(r"\b([0-9])\b", lambda found: str(int(found[1]) + 1), text, count=1)  # one constant
        path.write_text(changed if changed != text else text.replace('"""', '"""Changed. ', 1))
        source_sha256.cache_clear()
        assert source_sha256(module, copied) != before, name
        path.write_text(text)
    source_sha256.cache_clear()
    assert source_sha256(module, copied) == before


def test_imports_inside_functions_and_of_packages_are_followed(tmp_path):
    for name, text in {
        "a.py": "def f():\n    from ddpm_lab.b import g\n",
        "b.py": "from ddpm_lab import c\nimport ddpm_lab.d.e\n",
        "c.py": "import os\n",
        "d/__init__.py": "",
        "d/e.py": "from ddpm_lab.a import f\n",
        "alone.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert imported_modules("a", tmp_path) == ["a", "b", "c", "d", "d.e"]


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
