"""Checkpoint files: written atomically, read safely (`weights_only=True`, no fallback)."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solov2.config import InputError
from solov2.outputs import replace_file

FORMAT = "solov2"  # value of the key "format" in our own files

# mmengine puts its loss history, which holds numpy arrays and functions, into every checkpoint. Nobody here reads it;
# these names are allowed in a file only because they stand for `Inert` here, whatever they mean elsewhere.
MMENGINE_GLOBALS = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    *(
        f"{package}.multiarray.{function}"
        for package in ("numpy.core", "numpy._core")
        for function in ("_reconstruct", "scalar")
    ),
    "_codecs.encode",
    "__builtin__.getattr",
    "builtins.getattr",
    "numpy.ndarray",
    "numpy.dtype",
    *(f"numpy.dtypes.{kind}DType" for kind in ("Float32", "Float64", "Int32", "Int64", "Bool")),
)


class Inert:
    """Stands for an object of a file that is neither needed nor trusted: takes any arguments and does nothing."""

    def __init__(self, *_arguments: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write a checkpoint of our own with `write_file`.

    Args:
        path: target; its folder must exist.
        content: tensors, numbers, strings, lists, dictionaries. "format" is added. Our own files hold "model" (state
            dict), "config" (nested dict), "class_names", "category_ids", "traits", with averaged weights "averaged" and
            "updates", and for resuming what `commands.run.Run.content` adds.

    Raises:
        OSError: disk full, no permission; the old file stays.
    """
    write_file(path, {"format": FORMAT, **content})


def write_file(path: str | Path, content: dict[str, Any]) -> None:
    """Write `content` by `torch.save`, see `outputs.replace_file`.

    Raises:
        OSError: disk full, no permission; the old file stays.
    """
    with replace_file(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's complaint about the archive hides why it could not be written
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_file(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of any family onto the CPU.

    Raises:
        InputError: the file is missing, truncated, not a checkpoint, wants to run code, or claims more data than it has
            bytes (an archive is refused before anything of it is unpacked).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"weights file {path} does not exist")
    _check_archive(path)
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in MMENGINE_GLOBALS]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error)
        if "Unsupported" in reason or "GLOBAL" in reason or "weights_only" in reason.lower():
            raise InputError(
                f"{path} is refused: it holds objects other than tensors and plain values, which loading "
                "could run as code; save a plain state dict instead"
            ) from error
        raise InputError(f"{path} is not a checkpoint file") from error
    except Exception as error:  # bytes that are no pickle make the unpickler raise anything
        raise InputError(f"{path} cannot be read as a checkpoint; it is truncated or not a torch file") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a checkpoint dictionary")
    size = path.stat().st_size
    for name, tensor in _tensors(content):
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.nbytes > size:
            raise InputError(
                f"{path} is refused: its tensor {name} {list(tensor.shape)} is not stored in full in the {size} bytes "
                "of the file; save it dense and contiguous"
            )
    return content


def _check_archive(path: Path) -> None:
    """Refuse a zip archive that would grow when it is read: torch stores its records and never compresses them."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except Exception as error:  # a damaged directory makes zipfile raise BadZipFile, struct.error, ValueError, ...
        raise InputError(f"{path} cannot be read as a checkpoint; it is truncated or not a torch file") from error
    packed = [record for record in records if record.compress_type != zipfile.ZIP_STORED]
    if packed:
        largest = max(packed, key=lambda record: record.file_size)
        raise InputError(
            f"{path} is refused: its record {largest.filename} is compressed ({largest.compress_size} bytes become "
            f"{largest.file_size}), which torch never does; save the checkpoint again with torch.save"
        )
    claimed, size = sum(record.file_size for record in records), path.stat().st_size
    if claimed > size:
        raise InputError(f"{path} is refused: its records claim {claimed} bytes, and the file has {size}")


def _tensors(content: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of nested dictionaries, lists and tuples, each container once."""
    stack: list[tuple[str, Any]] = list(content.items())
    seen: set[int] = set()
    while stack:
        name, value = stack.pop()
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            stack += value.items() if isinstance(value, dict) else ((name, item) for item in value)


def is_own(content: dict[str, Any]) -> bool:
    """Whether a loaded file was written by `save_checkpoint`."""
    return content.get("format") == FORMAT


def save_step(folder: str | Path, step: int, content: dict[str, Any], *, keep: int) -> Path:
    """Write `step_XXXXXXXX.pth` of a run, let `last.pth` be the same file, and drop all but the newest `keep`.

    At every moment `last.pth` is whole, and so are the files before it.

    Raises:
        OSError: disk full, no permission; nothing that was there is lost.
    """
    folder = Path(folder)
    path = folder / step_file(step)
    save_checkpoint(path, content)
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


def newest_loadable(folder: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run folder that can be read, and a sentence for each newer one that cannot."""
    refused: list[str] = []
    last, steps = Path(folder) / "last.pth", step_checkpoints(folder)
    # A run that was killed between its step's file and `last.pth` leaves the one before it there.
    is_behind = bool(steps) and last.is_file() and not last.samefile(steps[0])
    for path in [*steps, last] if is_behind else [last, *steps]:
        if path.is_file():
            try:
                load_file(path)
            except InputError as error:
                refused.append(str(error))
            else:
                return path, refused
    return None, refused
