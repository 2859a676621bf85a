"""`ddpm study`: compute what is missing of a study, cell by cell, and report.

A cell is claimed by a lease, so that several workers share a folder: none is computed twice, and one whose worker died
is taken up by the next.
"""

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from ddpm_lab.core.config import Precision
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
    """Compute what is missing of a study, then its results and report.

    Args:
        out: the study's folder, new or to be continued; several workers may share it.
        cell: index of the only one to compute; None: all, one after another.
        device, data_dir, say: see `run.train`.
    Raises:
        InputError: a cell that does not exist, a folder of another study, or what no cell could be computed with.
        RunError: a cell failed; the others are done all the same.
        Interrupted: see `run.train`.
    """
    _check_folder(study, out)
    cells = study.in_precision(_precision(out, device)).cells
    if cell is not None and not 0 <= cell < len(cells):
        raise InputError(f"--cell must be from 0 to {len(cells) - 1}, the cells of study {study.name}, not {cell}")
    chosen = cells if cell is None else [cells[cell]]
    missing = [c for c in chosen if not is_done(out, c)]
    costs = []
    if missing:  # what cannot be computed is told before anything is written
        check_cell(study, missing[0], device, data_dir)
        costs = study_cost(study, missing, out, device, data_dir)
    study = _claim_folder(study, out, device)
    missing = [study.cells[one.index] for one in missing]  # in the precision that is settled now
    say(f"study {study.name}: {len(cells)} cells, {sum(is_done(out, c) for c in cells)} done")
    for line in costs:
        say(line)
    failed: list[str] = []

    def attempt(one: Cell) -> bool:
        """Compute a cell, unless another worker has it; whether it is done or failed."""
        with leased(out / "cells" / f"{one.name}.lease") as lease:
            if lease is None:
                return False
            if not is_done(out, one):  # since we looked
                say(f"cell {one.index} of 0 .. {len(cells) - 1}: {one.name}")
                try:
                    compute_cell(study, one, cell_folder(out, one), lease, device=device, data_dir=data_dir, say=say)
                except (InUse, LeaseLost):
                    return False
                except (Interrupted, BrokenPipeError):  # the latter: nobody reads what is said
                    raise
                except Exception as error:  # whatever it is, the other cells are none the worse
                    failed.append(one.name)
                    _note_failure(failure_path(out, one), error)
                    say(f"cell {one.index}, {one.name}, failed: {error}")
                    return True
            failure_path(out, one).unlink(missing_ok=True)
            return True

    left = [one for one in missing if not attempt(one)]
    left = [one for one in left if not is_done(out, one)]  # by others meanwhile
    if left:
        say(f"held by other workers: {', '.join(one.name for one in left)}; is one of them dead?")
        deadline = time.monotonic() + 1.2 * SECONDS
        while left and time.monotonic() < deadline:  # a living one touches its lease, a dead one's runs out
            time.sleep(min(5.0, SECONDS / 10))
            left = [one for one in left if not is_done(out, one) and not attempt(one)]
    if any(is_done(out, c) for c in cells):
        say(write_report(out))
    if failed:
        raise RunError(
            f"{len(failed)} of {len(chosen)} cells failed: {', '.join(failed)}; {out / 'cells'} says why in "
            "NAME.failed.json, and the same command tries again"
        )
    if left:
        say(f"left to other workers, which are at it: {', '.join(one.name for one in left)}")


def _check_folder(study: Study, out: Path) -> None:
    """Refuse a folder that holds something else."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; name a folder, new or of a study")
    if (out / "study.json").is_file():
        key = difference(study, open_study(out))
        if key is not None:
            raise InputError(f"--out {out} holds a study with another {key}; name another folder")
    elif out.is_dir():
        others = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
        if others and others != ["cells"]:
            raise InputError(f"--out {out} holds {others[0]} but no study.json; name an empty or new folder")


def _precision(out: Path, device: str) -> Precision:
    """What 'auto' means in this folder: what the first worker's device made of it, for all cells and those to come.

    Cells that are compared must not differ in precision because one was computed on another machine.
    """
    if (out / "study.json").is_file():
        return open_study(out).precision
    return precision_of(resolve_precision("auto", resolve_device(device)))


def _claim_folder(study: Study, out: Path, device: str) -> Study:
    """Begin the folder, or join those who have meanwhile; the study in its precision."""
    try:
        with locked(out, "--out", wait=True):  # of two that begin it at once, on unlike machines, one decides
            _check_folder(study, out)
            study = study.in_precision(_precision(out, device))
            (out / "cells").mkdir(exist_ok=True)
            if not (out / "study.json").is_file():
                replace_atomically(out / "study.json", (json.dumps(study.to_dict(), indent=2) + "\n").encode())
            return study
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error.strerror}") from error


def _note_failure(path: Path, error: Exception) -> None:
    told = {"error": str(error), "traceback": traceback.format_exc(), "time": time.strftime("%Y-%m-%d %H:%M:%S")}
    replace_atomically(path, (json.dumps(told, indent=2) + "\n").encode())
