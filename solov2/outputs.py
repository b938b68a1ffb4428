"""Output files: existing files are replaced only on request, inputs never, and every file is complete or absent."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from solov2.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

STDOUT = "-"  # the file name that stands for standard output
STDOUT_FLAGS = ("--json", "--results")  # the flags that take it
SYSTEM_FOLDERS = ("/proc/", "/sys/")  # nothing below them is a file of the user's, nor is anything directly in /dev
NAME_LENGTH = 60  # characters of a file's name in that of its temporary file: with 4 bytes each, still below 255


def check_outputs(
    outputs: Iterable[tuple[str, str | Path | None]], *, overwrite: bool, inputs: Iterable[str | Path | None] = ()
) -> None:
    """Check that output files can be written; called at the start of a command, before any long work.

    All names of a file count as the same: relative paths, `..`, links and hard links. For outputs, which may not exist
    yet, these include names that differ only in case or Unicode normalization, which some file systems ignore.

    Args:
        outputs: (argument that names the file, file). The file may be None, if it was not asked for, the null device,
            and for --json and --results also "-", standard output.
        overwrite: existing files may be replaced.
        inputs: files that must not be replaced. None and what is no file, such as the name of a model, are ignored.

    Raises:
        InputError: a file exists, would replace an input or another output, is a folder, a device, a FIFO or a socket,
            or is in a folder that is not writable.
    """
    taken: dict[object, str] = {}  # what identifies an output -> its flag
    folders: dict[object, str] = {}  # folder -> flag of an output in it
    replaced: dict[object, tuple[str, str | Path]] = {}  # what identifies a file -> the flag and name of its output
    existing: list[tuple[str, str | Path]] = []
    fold = functools.cache(_fold)
    for flag, path in outputs:
        if path is None or _is_null_device(path):
            continue
        identities: list[object] = [STDOUT]
        parents: list[object] = []
        if str(path) != STDOUT:
            if _check_output(Path(path), flag):
                existing.append((flag, path))
            found = _identity(path)
            folder = fold(Path(path).parent)
            identities = [folder / fold_name(Path(path).name)]  # a link is replaced, not followed
            parents = [] if folder in folders else [folder, *folder.parents]
            if found is not None:
                identities.append(found)
                replaced[found] = flag, path
        elif flag not in STDOUT_FLAGS:
            raise InputError(f"{flag} {path}: name a file; only {' and '.join(STDOUT_FLAGS)} write to standard output")
        others = [taken[key] for key in (*identities, *parents) if key in taken]
        others += [folders[key] for key in identities if key in folders]
        if others:
            raise InputError(f"{flag} {path} would replace the output of {others[0]}; name another file")
        taken |= dict.fromkeys(identities, flag)
        folders |= dict.fromkeys(parents, flag)
    for source in inputs if replaced else ():
        found = None if source is None else _identity(source)
        if found in replaced:
            flag, path = replaced[found]
            raise InputError(f"{flag} {path} would replace the input {source}; name another file")
    if existing and not overwrite:
        flag, path = existing[0]
        raise InputError(f"{path} already exists; give another {flag} or --overwrite")


def fold_name(name: str) -> str:
    """The name as file systems compare it that ignore case and Unicode normalization."""
    return unicodedata.normalize("NFC", name).casefold()


def _fold(folder: Path) -> Path:
    return Path(fold_name(os.path.realpath(folder)))


def _identity(path: str | Path) -> tuple[int, int] | None:
    """(device, inode) of a file, following links; None if there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _check_output(path: Path, flag: str) -> bool:
    """Check one output; returns whether something is there, a link that leads nowhere included."""
    if os.path.isdir(path):
        raise InputError(f"{flag} {path} is a folder; name a file")
    folder = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    if not folder.is_dir():
        raise InputError(f"{flag} {path}: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {path}: no permission to write in {folder}")
    if (os.path.exists(path) and not os.path.isfile(path)) or _is_in_system_folder(path):
        hint = f", or {STDOUT} for standard output" if flag in STDOUT_FLAGS else ""
        raise InputError(f"{flag} {path} is not a regular file; name one{hint}")
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:  # a name that is too long or has characters which the file system refuses
        raise InputError(f"{flag} {path}: {getattr(error, 'strerror', None) or error}; name another file") from error
    return True


def _is_null_device(path: str | Path) -> bool:
    """Whether a path is the null device itself, by any name, and not a link to it."""
    try:
        found = os.lstat(path)
        return stat.S_ISCHR(found.st_mode) and found.st_rdev == os.stat(os.devnull).st_rdev
    except (OSError, ValueError):
        return False


def _is_in_system_folder(path: Path) -> bool:
    """Whether the system itself makes this file: a setting, or an open file of a process, such as /dev/stdout."""
    folder = os.path.realpath(path.parent)
    return folder == "/dev" or f"{folder}/".startswith(SYSTEM_FOLDERS)


def check_cleared_folder(folder: str | Path, inputs: Iterable[str | Path]) -> None:
    """Check that no input would be deleted with the contents of a folder.

    Args:
        folder: its contents are to be replaced.
        inputs: files and folders that are read; those that do not exist are ignored.

    Raises:
        InputError: one of them is in the folder.
    """
    place = Path(folder).resolve()
    for path in inputs:
        if os.path.lexists(path):
            names = (Path(path).resolve(), Path(path).parent.resolve() / Path(path).name)
            if any(place == name or place in name.parents for name in names):
                raise InputError(f"--overwrite would delete the input {path} with {folder}; move one of them")


def write_json(path: str | Path, content: Any, *, indent: int | None = None, allow_nan: bool = True) -> None:
    """Write JSON in ASCII, or print it if `path` is "-"; folders are created as needed.

    Args:
        path: file to write.
        content: what to write.
        indent: as for `json.dumps`.
        allow_nan: write NaN and infinities, which are not standard JSON, in Python's notation.

    Raises:
        OSError: disk full or no permission; an existing file is left unchanged.
        TypeError: the content cannot be written as JSON; an existing file is left unchanged.
        ValueError: NaN or infinity without `allow_nan`; an existing file is left unchanged.
    """
    text = json.dumps(content, indent=indent, allow_nan=allow_nan)
    if str(path) == STDOUT:
        print(text)
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as file:
        file.write(f"{text}\n".encode())


def write_picture(path: str | Path, picture: Image) -> None:
    """Write a picture as a PNG if its name ends in .png, otherwise as a JPEG; folders are created as needed.

    Raises:
        OSError: disk full, no permission, or too large for a JPEG; an existing file is left unchanged.
    """
    kind = "PNG" if Path(path).suffix.lower() == ".png" else "JPEG"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as file:
        picture.save(file, format=kind, quality=95, subsampling=0)  # chroma subsampling would blur the labels


@contextlib.contextmanager
def replace_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` at the end, so that `path` is always the old or the complete new file.

    If `path` is a link, the link is replaced, and the file that it points to stays. The null device takes everything
    and is not replaced.

    Raises:
        OSError: disk full or no permission, with the name `path`; an existing file is left unchanged.
    """
    path = Path(path)
    if _is_null_device(path):
        with open(path, "wb") as file:
            yield file
        return
    temporary = _temporary_file(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _temporary_file(path: Path) -> Path:
    return path.with_name(f".{path.name[:NAME_LENGTH]}.{secrets.token_hex(4)}.tmp")
