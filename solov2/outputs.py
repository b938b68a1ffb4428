"""Output files: nothing is overwritten unless asked for, and every file is written completely or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from solov2.errors import InputError

STDOUT = "-"  # the file name that stands for standard output


def check_outputs(
    outputs: Iterable[tuple[str, str | Path | None]], *, overwrite: bool, inputs: Iterable[str | Path] = ()
) -> None:
    """Check that output files can be written; called at the start of a command, before any long work.

    Args:
        outputs: (argument that names the file, file). The file may be None, if it was not asked for, and for --json and
            --results also "-", standard output.
        overwrite: existing files may be replaced.
        inputs: files that must not be overwritten.

    Raises:
        InputError: a file exists, is a folder, is in a folder that is not writable, or is named twice.
    """
    taken = {Path(path).resolve(): "an input" for path in inputs}
    for flag, path in outputs:
        if path is None:
            continue
        resolved = Path(path) if _is_stdout(flag, path) else Path(path).resolve()
        if resolved in taken:
            raise InputError(f"{flag} {path} would replace {taken[resolved]}; name another file")
        if not _is_stdout(flag, path):
            _check_output(Path(path), flag, overwrite)
        taken[resolved] = f"the output of {flag}"


def _is_stdout(flag: str, path: str | Path) -> bool:
    return str(path) == STDOUT and flag in ("--json", "--results")


def _check_output(path: Path, flag: str, overwrite: bool) -> None:
    if path.is_dir():
        raise InputError(f"{flag} {path} is a folder; name a file")
    if path.exists() and not overwrite:
        raise InputError(f"{path} already exists; give another {flag} or --overwrite")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise InputError(f"{flag} {path}: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {path}: no permission to write in {folder}")


def write_json(path: str | Path, content: Any, *, indent: int | None = None, allow_nan: bool = True) -> None:
    """Write JSON in UTF-8, or print it if `path` is "-"; folders are created as needed.

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


@contextlib.contextmanager
def replace_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` at the end, so that `path` is always the old or the complete new file.

    Raises:
        OSError: disk full or no permission; an existing file is left unchanged.
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
