"""The folder of a run: whether it may be written to, who holds it, and which checkpoint a start goes on with."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from solov2 import distributed
from solov2.checkpoint import newest_loadable
from solov2.config import InputError

LAUNCH = ".launch"  # file that the writing run locks; it holds the name of the launch that opened the folder


def check_folder(folder: Path, resume: str | None, overwrite: bool) -> Path | None:
    """Path of the checkpoint to go on with; refuses to touch another run's folder. Nothing is written yet.

    Args:
        folder: of the run.
        resume: None, a file, or "auto" for the newest checkpoint of the folder that can be read; those that cannot are
            said. A worker that torchrun starts again goes on by itself, anew where there is no checkpoint yet.
        overwrite: replace what the folder holds.

    Raises:
        InputError: nothing to resume, or the folder belongs to something else.
    """
    again = started_again(folder)
    if resume == "auto" or again:
        path, refused = newest_loadable(folder)
        if distributed.launched_rank() == 0:
            for sentence in refused:
                print(f"warning: passed over: {sentence}", file=sys.stderr)
        if path is None and not again:
            raise InputError(f"nothing to resume: {folder} holds no checkpoint that can be read")
        return Path(resume) if path is None and resume not in (None, "auto") else path
    path = None if resume is None else Path(resume)
    if path is not None and not path.is_file():
        raise InputError(f"nothing to resume: {path} is not a file")
    if path is None or path.parent.resolve() != folder.resolve():
        _check_free(folder, overwrite)
    return path


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


def check_agreement(found: object, place: Path) -> None:
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
