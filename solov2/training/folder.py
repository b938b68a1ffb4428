"""The run folder: whether a run may write to it, its lock, its checkpoints, and which of them to resume from."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from solov2 import distributed
from solov2.checkpoint import Checkpoint
from solov2.errors import InputError
from solov2.weights import read_checkpoint

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOG = logging.getLogger(__name__)
LOCK_FILE = ".launch"  # locked by the run that writes to the folder; contains the name of its launch
LOCK_POSITION = 2**20  # position of the byte that is locked on Windows, where nobody else can read a locked byte


def check_folder(folder: Path, resume: bool | str | Path, overwrite: bool) -> Checkpoint | None:
    """Check that a run may use the folder, and return the checkpoint to resume from, if any. Writes nothing.

    Args:
        folder: run folder.
        resume: False, a file, or True for the newest readable checkpoint of the folder; newer ones that cannot be read
            are logged. A worker restarted by torchrun resumes by itself, or starts if there is no checkpoint yet.
        overwrite: whether the contents of the folder may be replaced.

    Raises:
        InputError: there is nothing to resume, or the folder is not free.
    """
    restart = is_restart(folder)
    if resume is True or restart:
        checkpoint, unreadable = newest_loadable(folder)
        if distributed.launched_rank() == 0:
            for reason in unreadable:
                LOG.warning("checkpoint skipped: %s", reason)
        if checkpoint is not None:
            return checkpoint
        if not restart:
            raise InputError(f"nothing to resume: {folder} contains no readable checkpoint")
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


def is_restart(folder: Path) -> bool:
    """Whether torchrun has restarted the workers of the run in this folder.

    A folder that an earlier launch left behind does not count: the first start may have failed because of it.
    """
    if not distributed.restarted():
        return False
    try:
        return (folder / LOCK_FILE).read_text() == distributed.launch_name()
    except OSError:
        return False


def check_ranks_agree(found: object, place: str | Path) -> None:
    """Check that all ranks found the same in `place`; all of them call this together.

    Raises:
        InputError: several hosts do not share the folder, or one could not read the newest file.
    """
    values = distributed.all_gather_objects(found)
    if any(value != values[0] for value in values):
        raise InputError(
            f"the processes find different checkpoints in {place}: {', '.join(map(str, values))}; all hosts need the "
            "same run folder"
        )


def _check_free(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"run folder {folder} is a file; choose another with --output")
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        raise InputError(f"no permission to write to {existing}; choose another run folder with --output")
    if not folder.exists() or all(path.name == LOCK_FILE for path in folder.iterdir()):
        return
    if not overwrite:
        raise InputError(
            f"run folder {folder} is not empty; continue the run with --resume, replace it with --overwrite, "
            "or choose another folder with --output"
        )
    if not (folder / "log.jsonl").exists():
        raise InputError(f"{folder} is not a run folder (it has no log.jsonl), so --overwrite does not replace it")


@contextlib.contextmanager
def run_folder(folder: Path, *, clear: bool) -> Iterator[None]:
    """Create the run folder and lock it, so that no other run can write to it. All ranks enter together.

    Args:
        folder: run folder.
        clear: delete its contents.

    Raises:
        InputError: another run is writing to it, or there is no permission to write.
    """
    if not distributed.is_main():
        distributed.barrier()
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK_FILE, "a")  # noqa: SIM115 (open until the run ends)
    except OSError as error:
        raise InputError(
            f"cannot write to run folder {folder}: {error.strerror}; choose another with --output"
        ) from error
    with file:
        _lock(file.fileno(), folder)
        if clear:
            for path in folder.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != LOCK_FILE:
                    path.unlink()
        file.truncate(0)
        file.write(distributed.launch_name())
        file.flush()
        distributed.barrier()
        yield


def _lock(file: int, folder: Path) -> None:
    """Lock the file; the system releases the lock when the process ends, and DataLoader workers do not inherit it."""
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            os.lseek(file, LOCK_POSITION, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError) as error:
        raise InputError(
            f"another run is writing to {folder}; wait until it ends, or choose another folder with --output"
        ) from error
    except (ImportError, OSError):  # the system or the file system does not support locks
        pass


def save_step(folder: str | Path, step: int, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write `step_XXXXXXXX.pth`, link `last.pth` to it, and delete all but the newest `keep` step files.

    Files of later steps do not count, since they are from an earlier attempt with other steps per epoch. Both files are
    complete at all times. `last.pth` is a copy if the file system has no hard links.

    Raises:
        OSError: disk full or no permission; existing checkpoints stay as they are.
    """
    folder = Path(folder)
    path = folder / step_file(step)
    checkpoint.save(path)
    link = folder / f".last.pth.{os.getpid()}.tmp"
    link.unlink(missing_ok=True)
    try:
        try:
            os.link(path, link)
        except OSError:  # the file system does not support hard links
            shutil.copyfile(path, link)
        os.replace(link, folder / "last.pth")
    finally:
        link.unlink(missing_ok=True)
    for old in [file for file in step_checkpoints(folder) if file.name <= path.name][keep:]:
        old.unlink(missing_ok=True)
    return path


def step_file(step: int) -> str:
    """File name of the checkpoint of a step."""
    return f"step_{step:08d}.pth"


def step_checkpoints(folder: str | Path) -> list[Path]:
    """The files `step_XXXXXXXX.pth` of a run folder, newest first."""
    return sorted(Path(folder).glob("step_" + "[0-9]" * 8 + ".pth"), reverse=True)


def remove_partial_files(folder: str | Path) -> None:
    """Delete temporary files left by a process that was killed while it wrote a checkpoint."""
    for path in Path(folder).glob(".*.pth.*.tmp"):
        path.unlink(missing_ok=True)


def latest_checkpoint(folder: str | Path) -> Path | None:
    """`last.pth` of a run folder, or else its newest step file; None if it has neither."""
    paths = [Path(folder) / "last.pth", *step_checkpoints(folder)]
    return next((path for path in paths if path.is_file()), None)


def newest_loadable(folder: str | Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest readable checkpoint of a run folder (or None), and an error message for each newer unreadable one."""
    unreadable: list[str] = []
    last, steps = Path(folder) / "last.pth", step_checkpoints(folder)
    # A run that was killed after writing a step file but before replacing `last.pth` leaves the previous one there. Its
    # number alone does not make a step file newer: the steps of an earlier attempt may have been smaller.
    is_behind = (
        bool(steps)
        and last.is_file()
        and not last.samefile(steps[0])
        and last.stat().st_mtime_ns <= steps[0].stat().st_mtime_ns
    )
    for path in [*steps, last] if is_behind else [last, *steps]:
        if path.is_file():
            try:
                return read_checkpoint(path), unreadable
            except InputError as error:
                unreadable.append(str(error))
    return None, unreadable
