"""The folder of a run: whether it may be written to, who holds it, its checkpoints, and which one a start resumes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from solov2 import distributed
from solov2.checkpoint import Checkpoint
from solov2.errors import InputError
from solov2.weights import read_checkpoint

LAUNCH = ".launch"  # file that the writing run locks; it holds the name of the launch that opened the folder


def check_folder(folder: Path, resume: bool | str | Path, overwrite: bool) -> Checkpoint | None:
    """The checkpoint to go on with; refuses to touch another run's folder. Nothing is written yet.

    Args:
        folder: of the run.
        resume: False, a file, or True for the newest checkpoint of the folder that can be read; those that cannot are
            reported. A worker that torchrun restarts resumes by itself, or starts where there is no checkpoint yet.
        overwrite: replace what the folder holds.

    Raises:
        InputError: nothing to resume, or the folder belongs to something else.
    """
    again = started_again(folder)
    if resume is True or again:
        checkpoint, refused = newest_loadable(folder)
        if distributed.launched_rank() == 0:
            for reason in refused:
                print(f"warning: passed over: {reason}", file=sys.stderr)
        if checkpoint is not None:
            return checkpoint
        if not again:
            raise InputError(f"nothing to resume: {folder} holds no checkpoint that can be read")
        return read_checkpoint(resume) if resume and resume is not True else None
    if resume is False:
        _check_free(folder, overwrite)
        return None
    path = Path(resume)
    if not path.is_file():
        raise InputError(f"nothing to resume: {path} is not a file")
    if path.parent.resolve() != folder.resolve():
        _check_free(folder, overwrite)
    return read_checkpoint(path)


def started_again(folder: Path) -> bool:
    """Whether torchrun has started the workers of the run in this folder again.

    What an earlier launch left there does not count: the first start may have been refused for it.
    """
    if not distributed.restarted():
        return False
    try:
        return (folder / LAUNCH).read_text() == distributed.launch_name()
    except OSError:
        return False


def check_agreement(found: object, place: str | Path) -> None:
    """Whether all processes, which call it together, found the same in a place.

    Raises:
        InputError: several hosts do not share the folder, or one could not read the newest file.
    """
    others = distributed.all_gather_objects(found)
    if any(other != others[0] for other in others):
        raise InputError(
            f"the processes find different checkpoints in {place}: {', '.join(map(str, others))}; all hosts need the "
            "same run folder"
        )


def _check_free(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"run folder {folder} is a file; name another with --output")
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        raise InputError(f"no permission to write to {existing}; name another run folder with --output")
    if not folder.exists() or all(path.name == LAUNCH for path in folder.iterdir()):
        return
    if not overwrite:
        raise InputError(
            f"run folder {folder} already holds files; go on with --resume, replace them with --overwrite, "
            "or name another folder with --output"
        )
    if not (folder / "log.jsonl").exists():
        raise InputError(f"{folder} is not a run folder (it has no log.jsonl), so --overwrite leaves it alone")


@contextlib.contextmanager
def run_folder(folder: Path, *, emptied: bool) -> Iterator[None]:
    """Make the run folder; within it no other run can open it. All processes enter together.

    Args:
        folder: of the run.
        emptied: remove what it holds.

    Raises:
        InputError: another run is writing to it, or it cannot be written.
    """
    if not distributed.is_main():
        distributed.barrier()
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LAUNCH, "a")  # noqa: SIM115 (held until the run ends)
    except OSError as error:
        raise InputError(
            f"cannot write to run folder {folder}: {error.strerror}; name another with --output"
        ) from error
    with file:
        _lock(file.fileno(), folder)
        if emptied:
            for path in folder.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != LAUNCH:
                    path.unlink()
        file.truncate(0)
        file.write(distributed.launch_name())
        file.flush()
        distributed.barrier()
        yield


def _lock(file: int, folder: Path) -> None:
    """The kernel drops the lock with the process, however it ends; loading processes do not inherit it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise InputError(
            f"another run is writing to {folder}; wait for its end, or name another folder with --output"
        ) from error
    except OSError:  # a file system without locks
        pass


def save_step(folder: str | Path, step: int, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write `step_XXXXXXXX.pth` of a run, make `last.pth` the same file, and drop all but the newest `keep`.

    At every moment `last.pth` is whole, and so are the files before it.

    Raises:
        OSError: disk full, no permission; nothing that was there is lost.
    """
    folder = Path(folder)
    path = folder / step_file(step)
    checkpoint.save(path)
    link = folder / f".last.pth.{os.getpid()}.tmp"
    link.unlink(missing_ok=True)
    try:
        try:
            os.link(path, link)
        except OSError:  # a file system without links
            shutil.copyfile(path, link)
        os.replace(link, folder / "last.pth")
    finally:
        link.unlink(missing_ok=True)
    for old in step_checkpoints(folder)[keep:]:
        old.unlink(missing_ok=True)
    return path


def step_file(step: int) -> str:
    """Name of the checkpoint of a step."""
    return f"step_{step:08d}.pth"


def step_checkpoints(folder: str | Path) -> list[Path]:
    """`step_XXXXXXXX.pth` of a run folder, newest first."""
    return sorted(Path(folder).glob("step_" + "[0-9]" * 8 + ".pth"), reverse=True)


def remove_leftovers(folder: str | Path) -> None:
    """Delete the temporary files of savings that were killed half-way."""
    for path in Path(folder).glob(".*.pth.*.tmp"):
        path.unlink(missing_ok=True)


def latest_checkpoint(folder: str | Path) -> Path | None:
    """`last.pth` of a run folder, else its newest step's, or None."""
    paths = [Path(folder) / "last.pth", *step_checkpoints(folder)]
    return next((path for path in paths if path.is_file()), None)


def newest_loadable(folder: str | Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a run folder that can be read, and a sentence for each newer one that cannot."""
    refused: list[str] = []
    last, steps = Path(folder) / "last.pth", step_checkpoints(folder)
    # A run that was killed between its step's file and `last.pth` leaves the one before it there.
    is_behind = bool(steps) and last.is_file() and not last.samefile(steps[0])
    for path in [*steps, last] if is_behind else [last, *steps]:
        if path.is_file():
            try:
                return read_checkpoint(path), refused
            except InputError as error:
                refused.append(str(error))
    return None, refused
