"""Checkpoint files: read once and validated, passed around as one object, and written atomically."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solov2.config import Config
from solov2.errors import InputError, count
from solov2.outputs import replace_file
from solov2.safetensors_file import is_safetensors, read_safetensors, write_safetensors
from solov2.torch_file import INERT_GLOBALS, check_torch_file

FORMAT = "solov2"  # value of the key "format" in files of this library
TRAITS = ("pixel_mean", "pixel_std", "channel_order", "stride_in_1x1", "modulated")  # settings that weights decide


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
    best: float  # mask AP or PQ of the best evaluation so far, -1 before the first
    global_batch: int  # images per optimizer step
    annotations_sha256: str  # of the training set
    random_states: list[dict[str, Tensor]]  # one per process
    stale: int = 0  # evaluations since the best one; older files do not have it
    updates: int | None = None  # steps in the weight average; None without averaging
    conditions: dict[str, str] = field(default_factory=dict)  # machine and data, to tell what changed at a resume

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
    stuff_names: list[str] | None = None  # of panoptic models, as the next one
    stuff_category_ids: list[int] | None = None
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
            content = {**content, "config": _with_named_precision(content["config"], content.get("conditions", {}))}
            training = TrainingState(**{**kept, "weights": content["model"]})
        return cls(
            source,
            content.get("averaged", content["model"]),
            traits=content.get("traits", {}),
            class_names=content.get("class_names"),
            category_ids=content.get("category_ids"),
            stuff_names=content.get("stuff_names"),
            stuff_category_ids=content.get("stuff_category_ids"),
            config=content.get("config"),
            training=training,
        )

    def content(self) -> dict[str, Any]:
        """The entries of a file of this library."""
        metadata = ("config", "traits", "class_names", "category_ids", "stuff_names", "stuff_category_ids")
        known = {name: getattr(self, name) for name in metadata}
        content = {"format": FORMAT, "model": self.weights, **{k: v for k, v in known.items() if v is not None}}
        if self.training is not None:
            state = {entry.name: getattr(self.training, entry.name) for entry in fields(TrainingState)}
            content |= {name: value for name, value in state.items() if name not in ("weights", "updates")}
            content["model"] = self.training.weights
            if self.training.updates is not None:
                content |= {"averaged": self.weights, "updates": self.training.updates}
        return content

    def save(self, path: str | Path) -> None:
        """Write a file of this library, in the safetensors format if its name ends in .safetensors.

        The folder must exist.

        Raises:
            OSError: disk full or no permission; an existing file is left unchanged.
            InputError: the state of a run cannot be stored in a safetensors file, or safetensors is not installed.
        """
        if not is_safetensors(path):
            write_file(path, self.content())
        elif self.training is None:
            write_safetensors(path, self.content())
        else:
            raise InputError(f"{path}: a safetensors file cannot hold the state of a run; name a .pth file")

    def configuration(self) -> Config | None:
        """The configuration stored in the file; None if there is none.

        Raises:
            InputError: its model section has unknown keys or invalid values.
        """
        return None if self.config is None else Config.from_checkpoint(self.config, source=self.source)


def _with_named_precision(config: dict[str, Any], conditions: Mapping[str, str]) -> dict[str, Any]:
    """Configuration of a run, with "tf32" for what files without the condition "precision" call float32."""
    train = config.get("train", {})
    if "precision" in conditions or train.get("precision") != "float32":
        return config
    return {**config, "train": {**train, "precision": "tf32"}}


def _is_weights(value: Any) -> bool:
    return _is_dict(value, str, Tensor)


def _is_list(value: Any, item: type) -> bool:
    return isinstance(value, list) and all(isinstance(each, item) and not isinstance(each, bool) for each in value)


def _is_dict(value: Any, key: type, item: type | tuple[type, ...]) -> bool:
    return isinstance(value, dict) and all(isinstance(k, key) and isinstance(v, item) for k, v in value.items())


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_plain(value: Any, depth: int = 6) -> bool:
    """Whether JSON can hold a value, to a depth that every function here can recurse to."""
    if isinstance(value, dict):
        return depth > 0 and all(isinstance(k, str) and _is_plain(v, depth - 1) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return depth > 0 and all(_is_plain(each, depth - 1) for each in value)
    return isinstance(value, (str, int, float, type(None)))


def _is_plain_dict(value: Any) -> bool:
    return isinstance(value, dict) and _is_plain(value)


def _is_config(value: Any) -> bool:
    return _is_plain_dict(value) and all(isinstance(value.get(key, {}), dict) for key in ("model", "data", "train"))


def _is_optimizer(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_dict(value.get("state"), int, dict)
        and all(_is_dict(state, str, (Tensor, int, float, type(None))) for state in value["state"].values())
        and _is_list(value.get("param_groups"), dict)
        and all(_is_list(group.get("params"), int) and _is_plain(group) for group in value["param_groups"])
    )


def _is_scaler(value: Any) -> bool:
    """Whether it is empty or a state of `torch.amp.GradScaler`."""
    wanted = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
    return value == {} or _is_dict(value, str, (int, float)) and value.keys() >= wanted


def _are_random_states(value: Any) -> bool:
    if not isinstance(value, list) or not all(_is_weights(states) and "cpu" in states for states in value):
        return False
    try:
        for states in value:
            torch.Generator().set_state(states["cpu"])
    except (RuntimeError, TypeError):
        return False
    return True


REQUIRED = ("model",)
ENTRIES: dict[str, Callable[[Any], bool]] = {
    "model": _is_weights,
    "averaged": _is_weights,
    "updates": _is_count,
    "stale": _is_count,
    "traits": _is_plain_dict,
    "class_names": lambda value: _is_list(value, str),
    "category_ids": lambda value: _is_list(value, int),
    "stuff_names": lambda value: _is_list(value, str),
    "stuff_category_ids": lambda value: _is_list(value, int),
    "config": _is_config,
    "conditions": lambda value: _is_dict(value, str, str),
}
REQUIRED_OF_RUNS = ("class_names", "category_ids", "config")
RUN_ENTRIES: dict[str, Callable[[Any], bool]] = {
    "optimizer": _is_optimizer,
    "scaler": _is_scaler,
    **dict.fromkeys(("epoch", "step", "evaluated"), _is_count),
    "global_batch": lambda value: _is_count(value) and value > 0,
    "best": lambda value: isinstance(value, (int, float)) and math.isfinite(value) and not isinstance(value, bool),
    "annotations_sha256": lambda value: isinstance(value, str),
    "random_states": _are_random_states,
}


def _check_entries(
    content: Mapping[str, Any], checks: Mapping[str, Callable[[Any], bool]], required: Iterable[str], source: str
) -> None:
    missing = next((name for name in required if name not in content), None)
    if missing is not None:
        raise InputError(f"{source} is not a complete checkpoint: entry '{missing}' is missing")
    wrong = next((name for name, is_valid in checks.items() if name in content and not is_valid(content[name])), None)
    if wrong is not None:
        kind = type(content[wrong]).__name__
        raise InputError(f"{source} is damaged: entry '{wrong}' ({kind}) is not what this library writes there")


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Check that no tensor contains NaN or infinity.

    Raises:
        InputError: one does; the message names it.
    """
    for name, tensor in tensors.items():
        # The sum is not finite if a value is not. It takes no memory, and where only it overflows, the values decide.
        if not tensor.is_floating_point() or tensor.sum().isfinite():
            continue
        wrong = int((~tensor.isfinite()).sum())
        if wrong:
            raise InputError(
                f"{source} is damaged, or its training diverged: {name} has {count(wrong, 'value')} that are NaN or "
                f"infinite, of {tensor.numel():,}; use another checkpoint"
            )


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
    """Read a file of any family onto the CPU, opening it only once. A file without checksums is logged.

    Raises:
        InputError: the file is missing, truncated, damaged (its checksums are verified) or not a checkpoint, could run
            code, or claims to hold more data than its size; it is rejected before anything in it is unpacked.
    """
    path = Path(path)
    if not os.path.isfile(path):  # opening a FIFO would wait for a writer
        problem = "is not a regular file" if os.path.exists(path) else "does not exist"
        raise InputError(f"weights file {path} {problem}")
    if is_safetensors(path):
        return read_safetensors(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"cannot read weights file {path}: {error.strerror or error}") from error
    with file:
        check_torch_file(file, path)
        file.seek(0)
        try:
            with torch.serialization.safe_globals([(Inert, name) for name in INERT_GLOBALS]):
                content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # given arbitrary bytes, the unpickler can raise anything
            raise InputError(f"{path} cannot be read as a checkpoint; it is truncated or not a torch file") from error
        size = os.fstat(file.fileno()).st_size
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a checkpoint dictionary")
    for name, tensor in _tensors(content):
        if tensor.nbytes > size:
            raise InputError(
                f"{path} is rejected: tensor {name} {list(tensor.shape)} is not fully stored in the file's {size} "
                "bytes; save it dense and contiguous"
            )
    return content


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
