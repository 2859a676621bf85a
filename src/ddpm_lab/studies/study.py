"""`ddpm study`: compute the missing cells of a study, then report.

Each cell is claimed by a lease, so that several workers can share a folder: no cell is computed twice, and the cell of
a dead worker is taken over by the next.
"""

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from ddpm_lab.core.device import precision_of, resolve_device, resolve_precision
from ddpm_lab.core.errors import InputError, Interrupted, RunError
from ddpm_lab.core.files import InUse, locked, replace_atomically
from ddpm_lab.studies.cell import check_cell, compute_cell, study_cost
from ddpm_lab.studies.grid import Cell, Study, cell_folder, difference, failure_path, is_done, open_study
from ddpm_lab.studies.lease import SECONDS, LeaseLost, leased
from ddpm_lab.studies.report import write_report


def run_study(
    study: Study,
    out: Path,
    *,
    cell: int | None = None,
    device: str = "auto",
    data_dir: Path | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> None:
    """Compute the missing cells of a study, then its results and report.

    Args:
        out: the study's folder, new or to be continued; several workers may share it.
        cell: index of the only cell to compute; None: all, one after another.
        device, data_dir, say: as in `run.train`.
    Raises:
        InputError: no such cell, the folder of another study, or settings that no cell can be computed with.
        RunError: a cell failed; the others are computed nevertheless.
        Interrupted: the user stopped it.
    """
    cells = _join_folder(study, out, device).cells
    if cell is not None and not 0 <= cell < len(cells):
        raise InputError(f"--cell must be from 0 to {len(cells) - 1} for study {study.name}, not {cell}")
    chosen = [c.index for c in cells if cell in (None, c.index) and not is_done(out, c)]
    costs = []
    if chosen:  # before anything is written
        missing = [cells[index] for index in chosen]
        check_cell(study, missing[0], device, data_dir)
        costs = study_cost(study, missing, out, device, data_dir)
    study = _claim_folder(study, out, device)
    cells = study.cells  # in the precision of the folder
    say(f"study {study.name}: {len(cells)} cells, {sum(is_done(out, c) for c in cells)} done")
    for line in costs:
        say(line)
    failed: list[str] = []

    def attempt(target: Cell) -> bool:
        """Compute a cell unless it is done; False: another worker holds it."""
        with leased(out / "cells" / f"{target.name}.lease") as lease:
            if lease is None:
                return False
            if not is_done(out, target):
                say(f"cell {target.index} of 0 .. {len(cells) - 1}: {target.name}")
                folder = cell_folder(out, target)
                try:
                    compute_cell(study, target, folder, lease, device=device, data_dir=data_dir, say=say)
                except (InUse, LeaseLost):
                    return False
                except (Interrupted, BrokenPipeError):  # the latter: the reader of the messages has ended
                    raise
                except Exception as error:  # other cells can still be computed
                    failed.append(target.name)
                    _write_failure(failure_path(out, target), error)
                    say(f"cell {target.index}, {target.name}, failed: {error}")
                    return True
            failure_path(out, target).unlink(missing_ok=True)
            return True

    held = [c for c in (cells[index] for index in chosen) if not attempt(c)]
    held = [c for c in held if not is_done(out, c)]
    if held:
        names = ", ".join(c.name for c in held)
        say(f"waiting for cells that other workers hold, in case one of these has died: {names}")
        deadline = time.monotonic() + 1.2 * SECONDS  # the lease of a dead worker has expired by then
        while held and time.monotonic() < deadline:
            time.sleep(min(5.0, SECONDS / 10))
            held = [c for c in held if not is_done(out, c) and not attempt(c)]
    if any(is_done(out, c) for c in cells):
        say(write_report(out))
    if failed:
        raise RunError(
            f"{len(failed)} of {1 if cell is not None else len(cells)} cells failed: {', '.join(failed)}; the errors "
            f"are in {out / 'cells'} as NAME.failed.json; run the same command to try again"
        )
    if held:
        say(f"other workers are still computing: {', '.join(c.name for c in held)}")


def _join_folder(study: Study, out: Path, device: str) -> Study:
    """The study in the precision of a folder: the folder's own, or for a new folder the one that 'auto' means here.

    Cells that are compared must not differ in precision because they were computed on different machines.

    Raises:
        InputError: the folder holds something else.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; give a new folder, or that of a study")
    if (out / "study.json").is_file():
        begun = open_study(out)
        key = difference(study, begun)
        if key is not None:
            raise InputError(f"--out {out} holds a study with another {key}; give another folder")
        return study.in_precision(begun.precision)
    if out.is_dir():
        others = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
        if others and others != ["cells"]:
            raise InputError(f"--out {out} holds {others[0]} but no study.json; give an empty or new folder")
    return study.in_precision(precision_of(resolve_precision("auto", resolve_device(device))))


def _claim_folder(study: Study, out: Path, device: str) -> Study:
    """Create the folder, or join the workers that have created it; returns the study in its precision."""
    try:
        with locked(out, "--out", wait=True):  # of two workers on different machines, the first sets the precision
            study = _join_folder(study, out, device)
            (out / "cells").mkdir(exist_ok=True)
            if not (out / "study.json").is_file():
                replace_atomically(out / "study.json", (json.dumps(study.to_dict(), indent=2) + "\n").encode())
            return study
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error.strerror}") from error


def _write_failure(path: Path, error: Exception) -> None:
    """Write the error of a cell."""
    failure = {"error": str(error), "traceback": traceback.format_exc(), "time": time.strftime("%Y-%m-%d %H:%M:%S")}
    replace_atomically(path, (json.dumps(failure, indent=2) + "\n").encode())
