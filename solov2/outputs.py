"""The files a command is told to write: nothing is replaced unasked, and each is there complete or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from solov2.errors import InputError

SCREEN = "-"  # as an output file: standard output


def check_outputs(
    outputs: Iterable[tuple[str, str | Path | None]], *, overwrite: bool, inputs: Iterable[str | Path] = ()
) -> None:
    """Whether files can be written later; for the start of a command, before any long work.

    Args:
        outputs: (the argument that names it, what will be written). None, where nothing was asked for, passes, and for
            --json and --results so does "-", the screen.
        overwrite: existing files may be replaced.
        inputs: files that must stay.

    Raises:
        InputError: a file exists, is a folder, lies where nothing can be written, or two of them are the same.
    """
    taken = {Path(path).resolve(): "an input" for path in inputs}
    for flag, path in outputs:
        if path is None:
            continue
        place = Path(path) if _is_screen(flag, path) else Path(path).resolve()
        if place in taken:
            raise InputError(f"{flag} {path} would replace {taken[place]}; name another file")
        if not _is_screen(flag, path):
            _check_output(Path(path), flag, overwrite)
        taken[place] = f"what {flag} writes"


def _is_screen(flag: str, path: str | Path) -> bool:
    return str(path) == SCREEN and flag in ("--json", "--results")


def _check_output(path: Path, flag: str, overwrite: bool) -> None:
    if path.is_dir():
        raise InputError(f"{flag} {path}: this is a folder; name a file")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already; give another {flag} or --overwrite")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise InputError(f"{flag} {path}: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {path}: no permission to write in {folder}")


def write_json(path: str | Path, content: Any, *, indent: int | None = None, allow_nan: bool = True) -> None:
    """Write JSON in UTF-8, to standard output where `path` is "-"; folders are made as needed. NaN and infinities have
    no standard form: Python's, or an error.

    Raises:
        OSError: disk full, no permission; an old file stays.
        TypeError: the content has no JSON form; an old file stays.
        ValueError: the same of a number, without `allow_nan`.
    """
    text = json.dumps(content, indent=indent, allow_nan=allow_nan)
    if str(path) == SCREEN:
        print(text)
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as file:
        file.write(f"{text}\n".encode())


@contextlib.contextmanager
def replace_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to, so that `path` holds either the old file or the whole new one, whatever happens in between.

    Raises:
        OSError: disk full, no permission; the old file stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
