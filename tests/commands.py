"""Commands in processes of their own, which start at once: a server that has imported PyTorch forks them."""

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

HEAVY = [
    "torch", "accelerate", "ddpm_lab.cli.main", "ddpm_lab.training.run", "ddpm_lab.evaluation.scores",
    "ddpm_lab.studies.study",
]  # fmt: skip
_SERVER = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
_SERVER.set_forkserver_preload(HEAVY)


def _run(arguments, environment, folder, outputs):
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in zip((1, 2), outputs, strict=True):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(descriptor, number)
        os.close(descriptor)
    import torch

    from ddpm_lab.cli.main import main

    if "OMP_NUM_THREADS" in environment:  # which PyTorch reads when it is imported
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    try:
        main(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


class Command:
    """`ddpm` with some arguments, in a process of its own; used as a `subprocess.Popen` whose output is text."""

    def __init__(self, arguments, **environment):
        self._place = tempfile.TemporaryDirectory()
        self._outputs = [str(Path(self._place.name) / name) for name in ("stdout", "stderr")]
        given = (list(arguments), os.environ | environment, os.getcwd(), self._outputs)
        self._process = _SERVER.Process(target=_run, args=given)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"process {self.pid} is still running")
        return self._process.exitcode

    def communicate(self, timeout=None):
        """What it printed on stdout and on stderr, once it has ended."""
        self.wait(timeout)
        texts = [Path(path).read_text() if Path(path).exists() else "" for path in self._outputs]
        self._place.cleanup()
        return texts
