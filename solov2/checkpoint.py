"""Checkpoint files: one object, read once and whole or refused, and written atomically."""

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


@dataclass(frozen=True)
class TrainingState:
    """What a run needs to go on from a checkpoint, beside the configuration.

    `weights` are those in training; with averaging they differ from the checkpoint's own.
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]  # empty unless the run trained in fp16
    epoch: int  # epochs done
    step: int  # optimizer steps done of the epoch after them
    evaluated: int  # epochs done at the last evaluation
    best: float  # mask AP of the best evaluation so far, -1 before the first
    global_batch: int  # images per optimizer step
    annotations_sha256: str  # of the training set
    random_states: list[dict[str, Tensor]]  # of each process
    updates: int | None = None  # steps in the averaged weights; None without averaging

    @property
    def position(self) -> tuple[int, int]:
        """(epochs done, optimizer steps done of the next)."""
        return self.epoch, self.step


@dataclass(frozen=True)
class Checkpoint:
    """Weights of a SOLOv2 and what is known of them; the same object for a file of any family.

    `solov2.weights.read_checkpoint` makes one of a file.
    """

    source: str  # the file, for messages
    weights: dict[str, Tensor]  # under our names; the averaged ones where a run kept them
    family: str = FORMAT  # "solov2", "original", "mmdet", "adelaidet"
    traits: dict[str, Any] = field(default_factory=dict)  # see `solov2.convert.convert_state_dict`
    class_names: list[str] | None = None
    category_ids: list[int] | None = None  # of annotation files, one per class
    config: dict[str, Any] | None = None  # nested, as `Config.to_dict` makes it
    training: TrainingState | None = None

    @classmethod
    def from_content(cls, content: Mapping[str, Any], source: str) -> Checkpoint:
        """The checkpoint in a file of our own.

        Raises:
            InputError: entries that are missing or of another type than we write.
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
        """The entries of a file of our own."""
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
        """Write a file of our own; its folder must exist.

        Raises:
            OSError: disk full, no permission; the old file stays.
        """
        write_file(path, self.content())

    def configuration(self) -> Config | None:
        """The configuration that the file carries; None where it has none.

        Raises:
            InputError: its model has keys that this version does not know.
        """
        return None if self.config is None else Config.from_checkpoint(self.config, source=self.source)


Kind = tuple[type, type]  # of an entry and of its items; `object` where these may be anything
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
        raise InputError(f"{source} is no whole checkpoint: its entry '{missing}' is missing")
    wrong = next((name for name, kind in kinds.items() if name in content and not _is(content[name], *kind)), None)
    if wrong is not None:
        kind = type(content[wrong]).__name__
        raise InputError(f"{source} is damaged: its entry '{wrong}' ({kind}) is not what this library writes there")


def _is(value: Any, kind: type, item: type) -> bool:
    if kind is float and type(value) is int:
        return True
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    if isinstance(value, dict):
        return item is object or all(isinstance(k, str) and isinstance(v, item) for k, v in value.items())
    return not isinstance(value, list) or all(isinstance(each, item) for each in value)


def write_file(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write `content` by `torch.save`, see `outputs.replace_file`.

    Raises:
        OSError: disk full, no permission; the old file stays.
    """
    with replace_file(path) as file:
        try:
            torch.save(dict(content), file)
        except RuntimeError as error:  # torch's complaint about the archive hides why it could not be written
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_file(path: str | Path) -> dict[str, Any]:
    """Read a file of any family onto the CPU; it is opened once.

    Raises:
        InputError: the file is missing, truncated, not a checkpoint, wants to run code, or claims more data than it has
            bytes (an archive is refused before anything of it is unpacked).
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
                f"{path} is refused: its tensor {name} {list(tensor.shape)} is not stored in full in the {size} bytes "
                "of the file; save it dense and contiguous"
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
                f"{path} is refused: it holds objects other than tensors and plain values, which loading "
                "could run as code; save a plain state dict instead"
            ) from error
        raise InputError(f"{path} is not a checkpoint file") from error
    except Exception as error:  # bytes that are no pickle make the unpickler raise anything
        raise InputError(f"{path} cannot be read as a checkpoint; it is truncated or not a torch file") from error


def _check_archive(file: BinaryIO, path: Path) -> None:
    """Refuse a zip archive that would grow when it is read: torch stores its records and never compresses them."""
    if file.read(4) != b"PK\x03\x04":
        return
    try:
        with zipfile.ZipFile(file) as archive:
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
    claimed, size = sum(record.file_size for record in records), os.fstat(file.fileno()).st_size
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
