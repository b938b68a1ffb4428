"""Checkpoint files: read once and validated, passed around as one object, and written atomically."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from solov2.config import Config
from solov2.errors import InputError
from solov2.outputs import replace_file

FORMAT = "solov2"  # value of the key "format" in files of this library

# mmengine stores its loss history, which contains numpy arrays and functions, in every checkpoint. It is not needed
# here. These names are allowed in a file because loading maps them to `Inert`, whatever they mean elsewhere.
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
    """Placeholder for an object in a file that is neither needed nor trusted; accepts any arguments, does nothing."""

    def __init__(self, *_arguments: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


@dataclass(frozen=True)
class TrainingState:
    """What a run needs to resume from a checkpoint, apart from the configuration.

    `weights` are the ones being trained; with averaging they differ from the checkpoint's `weights`.
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]  # empty unless the run trained in fp16
    epoch: int  # completed epochs
    step: int  # completed optimizer steps of the next epoch
    evaluated: int  # completed epochs at the last evaluation
    best: float  # mask AP of the best evaluation so far, -1 before the first
    global_batch: int  # images per optimizer step
    annotations_sha256: str  # of the training set
    random_states: list[dict[str, Tensor]]  # one per process
    updates: int | None = None  # steps in the weight average; None without averaging

    @property
    def position(self) -> tuple[int, int]:
        """(completed epochs, completed optimizer steps of the next epoch)."""
        return self.epoch, self.step


@dataclass(frozen=True)
class Checkpoint:
    """Weights of a SOLOv2 and their metadata; the same class for files of every family.

    `solov2.weights.read_checkpoint` reads one from a file.
    """

    source: str  # file name, for messages
    weights: dict[str, Tensor]  # under our names; the weight average if the run kept one
    family: str = FORMAT  # "solov2", "original", "mmdet", "adelaidet"
    traits: dict[str, Any] = field(default_factory=dict)  # see `solov2.convert.convert_state_dict`
    class_names: list[str] | None = None
    category_ids: list[int] | None = None  # the annotation file's ids, one per class
    config: dict[str, Any] | None = None  # nested, as returned by `Config.to_dict`
    training: TrainingState | None = None

    @classmethod
    def from_content(cls, content: Mapping[str, Any], source: str) -> Checkpoint:
        """Build a checkpoint from the entries of a file of this library.

        Raises:
            InputError: an entry is missing or has the wrong type.
        """
        _check_entries(content, ENTRIES, REQUIRED, source)
        training = None
        if all(name in content for name in (*REQUIRED_OF_RUNS, *RUN_ENTRIES)):
            _check_entries(content, RUN_ENTRIES, (), source)
            kept = {entry.name: content[entry.name] for entry in fields(TrainingState) if entry.name in content}
            training = TrainingState(**{**kept, "weights": content["model"]})
        return cls(
            source,
            content.get("averaged", content["model"]),
            traits=content.get("traits", {}),
            class_names=content.get("class_names"),
            category_ids=content.get("category_ids"),
            config=content.get("config"),
            training=training,
        )

    def content(self) -> dict[str, Any]:
        """The entries of a file of this library."""
        known = {name: getattr(self, name) for name in ("config", "traits", "class_names", "category_ids")}
        content = {"format": FORMAT, "model": self.weights, **{k: v for k, v in known.items() if v is not None}}
        if self.training is not None:
            state = {entry.name: getattr(self.training, entry.name) for entry in fields(TrainingState)}
            content |= {name: value for name, value in state.items() if name not in ("weights", "updates")}
            content["model"] = self.training.weights
            if self.training.updates is not None:
                content |= {"averaged": self.weights, "updates": self.training.updates}
        return content

    def save(self, path: str | Path) -> None:
        """Write a file of this library; its folder must exist.

        Raises:
            OSError: disk full or no permission; an existing file is left unchanged.
        """
        write_file(path, self.content())

    def configuration(self) -> Config | None:
        """The configuration stored in the file; None if there is none.

        Raises:
            InputError: its model section has unknown keys or invalid values.
        """
        return None if self.config is None else Config.from_checkpoint(self.config, source=self.source)


Kind = tuple[type, type]  # types of an entry and of its items; `object` allows any
REQUIRED = ("model",)
ENTRIES: dict[str, Kind] = {
    "model": (dict, Tensor),
    "averaged": (dict, Tensor),
    "updates": (int, object),
    "traits": (dict, object),
    "class_names": (list, str),
    "category_ids": (list, int),
    "config": (dict, object),
}
REQUIRED_OF_RUNS = ("class_names", "category_ids", "config")
RUN_ENTRIES: dict[str, Kind] = {
    **dict.fromkeys(("optimizer", "scaler"), (dict, object)),
    **dict.fromkeys(("epoch", "step", "evaluated", "global_batch"), (int, object)),
    "best": (float, object),
    "annotations_sha256": (str, object),
    "random_states": (list, dict),
}


def _check_entries(content: Mapping[str, Any], kinds: Mapping[str, Kind], required: Iterable[str], source: str) -> None:
    missing = next((name for name in required if name not in content), None)
    if missing is not None:
        raise InputError(f"{source} is not a complete checkpoint: entry '{missing}' is missing")
    wrong = next((name for name, kind in kinds.items() if name in content and not _fits(content[name], *kind)), None)
    if wrong is not None:
        kind = type(content[wrong]).__name__
        raise InputError(f"{source} is damaged: entry '{wrong}' ({kind}) is not what this library writes there")


def _fits(value: Any, kind: type, item: type) -> bool:
    if kind is float and type(value) is int:
        return True
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    if isinstance(value, dict):
        return item is object or all(isinstance(k, str) and isinstance(v, item) for k, v in value.items())
    return not isinstance(value, list) or all(isinstance(each, item) for each in value)


def write_file(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write `content` with `torch.save`, atomically (see `outputs.replace_file`).

    Raises:
        OSError: disk full or no permission; an existing file is left unchanged.
    """
    with replace_file(path) as file:
        try:
            torch.save(dict(content), file)
        except RuntimeError as error:  # torch's error about the archive hides the cause
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_file(path: str | Path) -> dict[str, Any]:
    """Read a file of any family onto the CPU, opening it only once.

    Raises:
        InputError: the file is missing, truncated or not a checkpoint, could run code, or claims to hold more data than
            its size (an archive is rejected before anything in it is unpacked).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"weights file {path} does not exist")
    with path.open("rb") as file:
        content, size = _load(file, path), os.fstat(file.fileno()).st_size
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a checkpoint dictionary")
    for name, tensor in _tensors(content):
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.nbytes > size:
            raise InputError(
                f"{path} is rejected: tensor {name} {list(tensor.shape)} is not fully stored in the file's {size} "
                "bytes; save it dense and contiguous"
            )
    return content


def _load(file: BinaryIO, path: Path) -> Any:
    _check_archive(file, path)
    file.seek(0)
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in MMENGINE_GLOBALS]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error)
        if "Unsupported" in reason or "GLOBAL" in reason or "weights_only" in reason.lower():
            raise InputError(
                f"{path} is rejected: it contains objects other than tensors and plain values, and loading them "
                "could run code; save a plain state dict instead"
            ) from error
        raise InputError(f"{path} is not a checkpoint file") from error
    except Exception as error:  # given arbitrary bytes, the unpickler can raise anything
        raise InputError(f"{path} cannot be read as a checkpoint; it is truncated or not a torch file") from error


def _check_archive(file: BinaryIO, path: Path) -> None:
    """Reject a zip archive that would expand when read; torch never compresses its records."""
    if file.read(4) != b"PK\x03\x04":
        return
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except Exception as error:  # a damaged directory makes zipfile raise BadZipFile, struct.error, ValueError, ...
        raise InputError(f"{path} cannot be read as a checkpoint; it is truncated or not a torch file") from error
    compressed = [record for record in records if record.compress_type != zipfile.ZIP_STORED]
    if compressed:
        largest = max(compressed, key=lambda record: record.file_size)
        raise InputError(
            f"{path} is rejected: record {largest.filename} is compressed ({largest.compress_size} bytes expand to "
            f"{largest.file_size}), which torch never does; save the checkpoint again with torch.save"
        )
    claimed, size = sum(record.file_size for record in records), os.fstat(file.fileno()).st_size
    if claimed > size:
        raise InputError(f"{path} is rejected: its records claim {claimed} bytes, but the file has only {size}")


def _tensors(content: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors in nested dictionaries, lists and tuples, visiting each container once."""
    stack: list[tuple[str, Any]] = list(content.items())
    seen: set[int] = set()
    while stack:
        name, value = stack.pop()
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            stack += value.items() if isinstance(value, dict) else ((name, item) for item in value)
