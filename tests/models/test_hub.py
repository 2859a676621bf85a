"""The hub: its real client, in a process of its own, against a stand-in on loopback."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from ddpm_lab.cli.main import run_command
from ddpm_lab.exchange.import_export import save_run
from ddpm_lab.models.hub import is_hub_name
from ddpm_lab.models.trained import PACKAGED, load
from ddpm_lab.studio import sources
from tests.commands import Command
from tests.conftest import tree_hash
from tests.stand_in import TOKEN, Hub

ROOT = Path(__file__).parent.parent
PIPELINE = ROOT / "fixtures" / "pipeline"
SAMPLE = ["--num-images", "3", "--num-steps", "2", "--device", "cpu"]


@pytest.fixture
def hub():
    with Hub() as server:
        yield server
        server.shutdown()


@pytest.fixture
def ddpm(hub, tmp_path, monkeypatch):
    """Runs a command with the stand-in as its hub; returns exit code, stdout and the lines of stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, **environment):
        command = Command(arguments, **hub.environment(tmp_path, **environment))
        out, err = command.communicate(timeout=300)
        assert TOKEN not in out + err
        return command.returncode, out, err.splitlines()

    return run


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_run):
    """The folder of `ddpm export --to run`."""
    folder = tmp_path_factory.mktemp("exports") / "tiny"
    assert run_command(["export", str(tiny_run), "--to", "run", "--out", str(folder)]) == 0
    return folder


def images(path):
    return np.load(path)["images"]


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("google/ddpm-cifar10-32", True),
        ("google/ddpm@main", True),
        ("google/ddpm@refs/pr/1", True),
        ("google/ddpm@" + "0" * 40, True),
        ("here/run", False),
        ("here/typo", False),
        ("here/typo@main", True),
        ("here/run@main", False),
        ("./google/ddpm", False),
        ("google/ddpm/unet", False),
        ("google", False),
        ("../ddpm", False),
        ("google/..", False),
        ("google/ddpm@../x", False),
        ("google/ddpm.git", False),
        ("", False),
        ("google/ddpm@", False),
        (Path("google/ddpm"), False),
    ],
)
def test_names_on_the_hub(name, is_one, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("here/run", "here/run@main"):
        Path(folder).mkdir(parents=True)
    assert is_hub_name(name) is is_one


def test_a_model_is_downloaded_once_and_its_revision_recorded(ddpm, hub, tmp_path):
    commit = hub.add_folder("some/pipeline", PIPELINE)
    weights = "unet/diffusion_pytorch_model.safetensors"
    size = sum((PIPELINE / name).stat().st_size for name in (weights, "unet/config.json", "model_index.json"))
    size += (PIPELINE / "scheduler" / "scheduler_config.json").stat().st_size
    code, out, err = ddpm("sample", "some/pipeline", *SAMPLE, "--out", "images")
    assert code == 0, err
    assert err == [f"downloading some/pipeline, revision {commit}: {size / 1000:.1f} kB, 4 files"]
    assert json.loads(Path("images/sampling.json").read_text())["revision"] == commit
    assert run_command(["sample", str(PIPELINE), *SAMPLE, "--out", "expected"]) == 0
    for path in Path("expected").glob("*.png"):
        assert path.read_bytes() == (Path("images") / path.name).read_bytes()
    asked = hub.paths()
    assert not any("README" in path or "samples" in path for path in asked)

    newer = hub.add("some/pipeline", hub.newest("some/pipeline")[1] | {"README.md": b"better said"})
    code, out, err = ddpm("evaluate", "some/pipeline", *SAMPLE, "--features", "classifier", "--metrics", "is",
                          "--reference", "digits:train",
                          "--is-splits", "1", "--bootstrap", "0", "--json")  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["revision"] == newer
    assert err == []  # only the README is new
    assert sum("/store/" in path for path in hub.paths()) == 1

    code, out, err = ddpm("sample", "some/pipeline", "--num-images", "4", *SAMPLE[2:], "--out", "images")
    assert code == 0, err  # another revision with the same weights continues the folder
    assert "4 images (3 existed already)" in out
    code, out, err = ddpm("info", f"some/pipeline@{commit}")
    assert code == 0
    assert f"on the hub, revision {commit}" in out
    code, out, err = ddpm("cache", "--clear", "hub")
    assert "hub: 1 deleted" in out


def test_a_broken_download_is_repeated(ddpm, hub):
    """By the client in the same command, or by the next command, which asks only for what is not complete."""
    hub.add_folder("some/pipeline", PIPELINE)
    hub.breaks = 1
    code, _, err = ddpm("info", "some/pipeline")
    assert (code, len(err)) == (0, 1)  # the size; the client's own messages are not shown
    assert sum("/store/" in path for path in hub.paths()) == 2

    hub.add_folder("some/copy", PIPELINE)
    hub.wrong = b"short"
    code, _, err = ddpm("info", "some/copy")
    assert code == 2
    assert err[-1].startswith("error: the download of some/copy broke off: ")
    assert err[-1].endswith("run the command again to complete it")
    hub.wrong, asked = None, len(hub.requests)
    code, _, err = ddpm("info", "some/copy")
    assert code == 0
    assert err[0].endswith(" kB, 1 file")
    assert not any("config.json" in path for _, path, _ in hub.requests[asked:])


def test_a_file_of_another_hash_is_refused_and_deleted(ddpm, hub, tmp_path):
    hub.add_folder("some/pipeline", PIPELINE)
    weights = (PIPELINE / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    hub.wrong = weights[:-1] + bytes([weights[-1] ^ 1])
    code, _, err = ddpm("info", "some/pipeline")
    assert code == 2
    assert re.fullmatch(
        r"error: unet/diffusion_pytorch_model.safetensors of some/pipeline is damaged: its hash is \w{64}, and the hub "
        r"lists \w{64}; it was deleted, so run the command again", err[-1],
    )  # fmt: skip
    code, _, err = ddpm("info", "some/pipeline", HF_HUB_OFFLINE="1")
    assert code == 2
    assert "no copy in the cache" in err[0]
    hub.wrong = None
    code, *_ = ddpm("info", "some/pipeline")
    assert code == 0


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("some/absent", "there is no such folder here, and {url} has no such repository that you may read; for a"),
        ("some/private", "for a private one, log in with `hf auth login`"),
        ("some/pickle", "has its weights in diffusion_pytorch_model.bin, a pickle, which can run any code"),
        ("some/data", "holds no model of diffusers or of ddpm-lab, but data.csv, README.md"),
        ("some/pickle@v2", "some/pickle on {url} has no such revision"),
        ("empty/typo", "for the hub, as there is a folder empty here, write empty/typo@main"),
        ("some/absent/model", "no model 'some/absent/model': give a run folder"),
    ],
)
def test_what_cannot_be_read_is_one_line(ddpm, hub, source, words):
    hub.add_folder("some/private", PIPELINE)
    hub.private.add("some/private")
    hub.add("some/pickle", {"config.json": b"{}", "diffusion_pytorch_model.bin": b"\x80"})
    hub.add("some/data", {"data.csv": b"1", "README.md": b""})
    Path("empty").mkdir()
    code, _, err = ddpm("sample", source, "--out", "x.png")
    assert code == 2
    (line,) = err
    assert words.format(url=hub.url) in line
    assert not Path("x.png").exists()
    assert not Path("cache").exists()


def test_the_login_opens_a_private_repository_and_stays_on_the_hub(ddpm, hub):
    hub.add_folder("some/private", PIPELINE)
    hub.private.add("some/private")
    code, _, err = ddpm("info", "some/private", HF_TOKEN=TOKEN)
    assert code == 0, err
    sent = [("Authorization" in {name.title() for name in headers}, path) for _, path, headers in hub.requests]
    assert any(has_token for has_token, _ in sent)
    assert not any(has_token for has_token, path in sent if path.startswith("/store/"))


def test_without_a_network_the_copy_in_the_cache_is_used(ddpm, hub):
    commit = hub.add_folder("some/pipeline", PIPELINE)
    code, _, err = ddpm("info", "some/pipeline", HF_HUB_OFFLINE="1")
    assert code == 2
    (line,) = err
    assert line.startswith("error: no model 'some/pipeline': there is no such folder here, no copy in the cache ")
    assert line.endswith(f"and {hub.url} gives no answer (OfflineModeIsEnabled)")
    assert hub.requests == []
    assert ddpm("info", "some/pipeline")[0] == 0
    asked = len(hub.requests)
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        code, out, err = ddpm("info", "some/pipeline", **environment)
        assert code == 0, err
        assert f"revision {commit}" in out
        assert f"some/pipeline is revision {commit[:12]}, from the cache" in err[0]
    hub.down = True
    code, _, err = ddpm("info", "some/pipeline")
    assert code == 0
    assert err == [
        f"warning: {hub.url} answers with status 503: some/pipeline is revision {commit[:12]}, from the cache"
    ]
    assert len(hub.requests) == asked + 1
    code, _, err = ddpm("info", f"some/pipeline@{commit}")
    assert (code, err, len(hub.requests)) == (0, [], asked + 1)  # a commit never changes


def test_a_run_makes_a_round_trip(ddpm, hub, exported, tiny_run, tmp_path):
    files = {"notes.txt": b"mine", "model_index.json": b"{}", "unet/config.json": b"{}", ".gitattributes": b"x"}
    hub.add("me/tiny", files)
    code, out, err = ddpm("export", str(tiny_run), "--to", "run", "--push", "me/tiny", HF_TOKEN=TOKEN)
    assert code == 0, err
    commit, files = hub.newest("me/tiny")
    assert out.startswith(f"{hub.url}/me/tiny, revision {commit}: ")
    assert sorted(files) == sorted(
        [".gitattributes", "README.md", "config.json", "ema.safetensors", "meta.json", "notes.txt", "samples.png"]
    )
    assert "ddpm sample me/tiny --out" in files["README.md"].decode()
    for name in ("config.json", "ema.safetensors", "meta.json"):
        assert files[name] == (exported / name).read_bytes()
    code, _, err = ddpm("sample", "me/tiny", *SAMPLE, "--out", "theirs.npz")
    assert code == 0, err
    assert run_command(["sample", str(tiny_run), *SAMPLE, "--out", "ours.npz"]) == 0
    assert (images("ours.npz") == images("theirs.npz")).all()

    for flag in (("--checkpoint", "3"), ("--weights", "raw")):
        code, _, err = ddpm("sample", "me/tiny", *SAMPLE, *flag, "--out", "x.png")
        assert (code, err) == (2, ["error: me/tiny has one set of weights; leave --weights and --checkpoint out"])


def test_a_pipeline_makes_a_round_trip(ddpm, hub, tiny_run):
    pytest.importorskip("diffusers")
    code, out, err = ddpm("export", str(tiny_run), "--to", "diffusers", "--push", "me/tiny", "--out", "kept",
                          HF_TOKEN=TOKEN)  # fmt: skip
    assert code == 0, err
    assert out.startswith(f"kept and {hub.url}/me/tiny, revision ")
    for path, content in hub.newest("me/tiny")[1].items():
        assert path == ".gitattributes" or Path("kept", path).read_bytes() == content
    code, out, err = ddpm("import", "me/tiny", "--run", "run")
    assert code == 0, err
    record = json.loads(Path("run/config.json").read_text())
    assert (record["imported"], record["revision"]) == ("me/tiny", hub.newest("me/tiny")[0])
    for source, out in ((str(tiny_run), "ours.npz"), ("run", "theirs.npz")):
        assert run_command(["sample", source, *SAMPLE, "--sampler", "ddim", "--out", out]) == 0
    assert (images("ours.npz") == images("theirs.npz")).all()


def test_a_push_needs_a_login_and_the_right_to_write(ddpm, hub, tiny_run, monkeypatch):
    export = ["export", str(tiny_run), "--to", "run", "--out", "kept", "--push"]
    code, _, err = ddpm(*export, "me/tiny")
    assert (code, err) == (2, ["error: --push requires a login to the hub: log in with `hf auth login`"])
    assert hub.requests == []
    code, _, err = ddpm(*export, "other/tiny", HF_TOKEN=TOKEN)
    assert code == 2
    words = f"error: {hub.url} does not let this login write to other/tiny: name one of yours, or log in with"
    assert err[-1].startswith(words)
    assert not Path("kept").exists()
    assert "other/tiny" not in hub.commits


def test_a_run_starts_from_the_hub_and_says_so(ddpm, hub, exported, tiny_recipe):
    commit = hub.add_folder("some/tiny", exported)
    train = ("train", str(tiny_recipe), "--run", "tuned", "--from", "some/tiny", "--device", "cpu",
             "--training.num-steps", "4")  # fmt: skip
    for _ in range(2):  # the second continues, and asks the hub for nothing
        code, _, err = ddpm(*train)
        assert code == 0, err
        assert json.loads(Path("tuned/config.json").read_text())["from"]["revision"] == commit
        hub.commits.clear()


def test_training_images_of_a_stranger_s_folder_are_not_read(ddpm, hub, exported, tmp_path):
    shutil.copytree(exported, "stranger")
    record = json.loads(Path("stranger/config.json").read_text())
    record["config"]["data"] |= {"dataset": str(tmp_path), "image_size": 8}
    Path("stranger/config.json").write_text(json.dumps(record))
    hub.add_folder("some/stranger", Path("stranger"))
    code, _, err = ddpm("evaluate", "some/stranger", "--features", "classifier", "--device", "cpu")
    assert code == 2
    assert "does not name its training images; give --reference" in err[-1]


def test_an_exported_run_is_the_same_model(exported, tiny_run, tmp_path, capsys):
    step = tiny_run / "checkpoints" / "step_00000012" / "ema.safetensors"
    assert (exported / "ema.safetensors").read_bytes() == step.read_bytes()
    again = tmp_path / "tiny"
    assert run_command(["export", str(exported), "--to", "run", "--out", str(again)]) == 0
    assert tree_hash(again) == tree_hash(exported)
    (tmp_path / "mnist").mkdir()
    save_run(load("mnist", device="cpu"), tmp_path / "mnist")  # in half precision, and it stays so
    packaged = (PACKAGED / "mnist" / "ema.safetensors").read_bytes()
    assert (tmp_path / "mnist" / "ema.safetensors").read_bytes() == packaged
    assert run_command(["export", str(tiny_run), "--to", "run", "--weights", "raw", "--out", "x"]) == 2
    assert "averaged weights only" in capsys.readouterr().err


def test_the_studio_opens_nothing_on_the_hub(studio_runs, monkeypatch):
    monkeypatch.setattr("ddpm_lab.models.hub.fetch", lambda name: pytest.fail("asked the hub"))
    for name in ("google/ddpm-cifar10-32", "google/ddpm-cifar10-32@main"):
        with pytest.raises(ValueError, match="there is no model"):
            sources.open_model(studio_runs, name, "cpu")
        with pytest.raises(ValueError, match="there is no model"):
            sources.source_of(studio_runs, name)
