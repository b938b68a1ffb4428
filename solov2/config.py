"""Typed configuration: dataclasses filled from YAML, one `base:` level, loud errors.

The defaults of the dataclasses are SOLOv2 R50-FPN, 1x schedule (paper section 3.1, constants of mmdetection). A YAML
file names only what differs; unknown keys and wrong types are refused with the nearest match.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from solov2.errors import InputError
from solov2.settings import PostprocessSettings


@dataclass(frozen=True)
class ModelConfig(PostprocessSettings):
    """Architecture, preprocessing and post-processing of one model. Sizes in pixels of the network input."""

    backbone: str = "resnet50"  # resnet10, resnet18, resnet34, resnet50, resnet101, resnext101_64x4d
    backbone_width: int = 64  # channels of the stem; 64 is the published ResNet
    frozen_stages: int = 1  # 0 nothing, 1 the stem and layer1, ... 4 all
    frozen_batch_norm: bool = True  # running statistics also in training; the affine of unfrozen stages still trains
    deformable_stages: bool = False  # 3x3 of every bottleneck in layer2..layer4 is a modulated deformable convolution
    fpn_channels: int = 256
    tower_channels: int = 512
    tower_depth: int = 4
    deformable_tower_convs: int = 0  # how many convolutions of each tower, counted from its end
    mask_hidden_channels: int = 128
    mask_feature_channels: int = 256  # E: the length of a dynamic kernel
    deformable_mask_branch: bool = False
    modulated: bool = True  # DCNv2; False is DCNv1 (offsets only), as in the authors' light R50-DCN
    stride_in_1x1: bool = False  # MSRA's bottleneck, in weights from AdelaiDet
    channel_order: str = "rgb"  # of the network input; bgr in weights from AdelaiDet
    head_norm: str = "group"  # group, or batch for small models trained from scratch
    num_classes: int = 80
    grid_sizes: tuple[int, ...] = (40, 36, 24, 16, 12)
    scale_ranges: tuple[tuple[float, float], ...] = ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048))
    center_sigma: float = 0.2  # size of the centre region as a share of the box
    input_scale: tuple[int, int] = (1333, 800)  # (long edge at most, short edge at most) at test time
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)

    @property
    def postprocess_settings(self) -> PostprocessSettings:
        """The thresholds and limits alone."""
        names = [entry.name for entry in dataclasses.fields(PostprocessSettings)]
        return PostprocessSettings(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class DataConfig:
    """Where the data lies (paths below `root` unless absolute) and how an image becomes a training sample."""

    root: str = "data/coco"
    train_annotations: str = "annotations/instances_train2017.json"
    train_images: str = "train2017"
    val_annotations: str = "annotations/instances_val2017.json"
    val_images: str = "val2017"
    train_scales: tuple[int, ...] = (800,)  # short edges, one is drawn per image
    train_long_edge: int = 1333
    flip_probability: float = 0.5
    dihedral: bool = False  # all eight flips and quarter turns, for images without an up
    keep_empty: bool = False  # train on images without instances too
    min_image_size: int = 32
    skip_broken_images: bool = False
    workers: int = 2  # loader processes per training process
    shapes: bool = False  # generate the data set of coloured shapes at `root` when it is not there
    shapes_size: int = 192
    shapes_train: int = 1000
    shapes_val: int = 100
    shapes_seed: int = 0


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation. The learning rate belongs to `reference_batch_size` images and is scaled linearly from there."""

    epochs: int = 12
    batch_size: int = 2  # images per process
    reference_batch_size: int = 16
    accumulate: int = 1  # batches per optimiser step
    optimizer: str = "sgd"  # sgd, adamw
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay_norms: bool = True  # weight decay on norms and biases too, as in the reference
    schedule: str = "step"  # step, cosine
    step_epochs: tuple[int, ...] = (8, 11)  # learning rate x 0.1 after these epochs
    warmup_steps: int = 500
    warmup_start: float = 0.001  # share of the learning rate in the first step
    clip_norm: float = 35.0  # L2 norm of all gradients; 0 switches clipping off
    mask_weight: float = 3.0
    precision: str = "float32"  # float32, bf16, fp16
    winograd: bool = True  # wide 3x3 convolutions by F(4x4, 3x3) where it pays: training in float32 on a CPU
    memory_format: str = "auto"  # channels_last, contiguous; auto: see build.choose_memory_format
    pretrained_backbone: str = "imagenet"  # imagenet (torchvision IMAGENET1K_V1), none, or the path of a file
    seed: int = 0
    evaluate_every: int = 1  # epochs; the last epoch is always evaluated unless this is 0
    checkpoint_every: int = 1  # epochs
    checkpoint_steps: int = 1000  # optimiser steps between checkpoints inside an epoch; 0: none
    keep_checkpoints: int = 2  # the newest ones; the best is kept beside them
    ema_decay: float = 0.0  # of averaged weights, which are then evaluated; 0: none. 1 - 10 / steps is a start
    nonfinite: str = "stop"  # after a step that is not finite: stop, or skip it and go on
    stall_seconds: int = 1800  # a loading process or another rank that is silent for so long ends the run
    deterministic: bool = False  # the same bits for the same seed, processes and device, or an error
    log_every: int = 50  # steps
    picture_images: int = 8  # validation images in the picture at the end
    picture_score: float = 0.3


SECTIONS = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}


@dataclass(frozen=True)
class Config:
    """One resolved configuration; `name` is the model name, which is also the file name."""

    name: str = "solov2_r50_fpn_1x"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionary of plain YAML/JSON types (tuples become lists)."""
        values = _plain(dataclasses.asdict(self))
        limits = [entry.name for entry in dataclasses.fields(PostprocessSettings)]  # inherited, so they come first
        values["model"] |= {name: values["model"].pop(name) for name in limits}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "configuration") -> Config:
        """Build and check a configuration.

        Args:
            values: nested mapping with the keys of this class.
            source: what to call it in error messages, usually the file name.

        Raises:
            InputError: unknown key (with the nearest match), wrong type, or values that contradict each other.
        """
        _check_keys(values, ["name", *SECTIONS], source)
        if not isinstance(values.get("name", ""), (str, int, float)):
            raise InputError(f"{source}: name must be str, got {_shown(values['name'])}")
        built = {key: _build(SECTIONS[key], values.get(key) or {}, f"{source}: {key}") for key in SECTIONS}
        config = cls(name=str(values.get("name", cls.name)), **built)
        _check_values(config, source)
        return config

    @classmethod
    def from_checkpoint(cls, values: Mapping[str, Any], source: str) -> Config:
        """The configuration that a checkpoint of an older or newer version carries.

        Keys of `data` and `train` that this version does not know are passed over, they change no weight; the model's
        must all be known.

        Raises:
            InputError: as `from_dict`.
        """
        kept = dict(values)
        for name, section in (("data", DataConfig), ("train", TrainConfig)):
            known = {entry.name for entry in dataclasses.fields(section)}
            kept[name] = {key: value for key, value in (values.get(name) or {}).items() if key in known}
        return cls.from_dict(kept, source)


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """'section.key old -> new' of each setting that two nested dictionaries have both and that differs."""
    changed: list[str] = []
    for key in sorted(before.keys() & now.keys()):
        if isinstance(before[key], Mapping) and isinstance(now[key], Mapping):
            changed += changed_settings(before[key], now[key], f"{prefix}{key}.")
        elif json.dumps(before[key]) != json.dumps(now[key]):  # as YAML, JSON does not tell tuples from lists
            changed.append(f"{prefix}{key} {json.dumps(before[key])} -> {json.dumps(now[key])}")
    return changed


def config_folder() -> Path:
    """Folder of the named configurations: inside the installed package, else beside it in a checkout.

    Raises:
        InputError: neither exists.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "quickstart.yaml").is_file():
            return folder
    raise InputError(
        f"the named configurations are missing (looked in {package / 'configs'} and "
        f"{package.parent / 'configs'}); reinstall solov2"
    )


def list_models() -> list[str]:
    """Names of all configurations, sorted; each is accepted by `build_model`, train.py, eval.py and benchmark.py."""
    return sorted(path.stem for path in config_folder().glob("*.yaml"))


def find_config(name: str | Path) -> Path:
    """Path of a configuration given as a model name or as a YAML file.

    Raises:
        InputError: no such file or name; the message lists close names.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        if (config_folder() / path.name).is_file() and path.parent.name in ("", "configs"):
            return config_folder() / path.name  # `configs/NAME.yaml` typed outside the checkout
        raise InputError(f"configuration file {path} does not exist; named ones: {', '.join(list_models())}")
    if str(name) in list_models():
        return config_folder() / f"{name}.yaml"
    raise InputError(
        f"unknown model name '{name}'{did_you_mean(str(name), list_models())}; available: {', '.join(list_models())}"
    )


def load_config(name: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Config:
    """Read a configuration by model name or path and apply overrides.

    Args:
        name: model name (`list_models`) or path of a YAML file. The file may name one other file by `base:`, relative
            to itself; its own values win.
        overrides: {"section.key": value} or strings "section.key=value" with the value in YAML.

    Raises:
        InputError: file, key, type or value is wrong; the sentence names it.
    """
    path = find_config(name)
    values = _read_yaml(path)
    base = values.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise InputError(f"{path}: base must be the name of a file, got {_shown(base)}")
        base_values = _read_yaml(path.parent / str(base))
        if "base" in base_values:
            raise InputError(f"{path.parent / str(base)}: a base file cannot have a base of its own; merge the two")
        values = _merge(base_values, values)
    values.setdefault("name", path.stem)
    return override_config(Config.from_dict(values, source=path.name), overrides)


def override_config(config: Config, overrides: Mapping[str, Any] | Sequence[str]) -> Config:
    """Copy of a configuration with some entries changed.

    Args:
        config: what to start from.
        overrides: {"section.key": value}, or {"key": value} since names are unique across sections, or strings
            "section.key=value" with the value in YAML.

    Raises:
        InputError: key, type or value is wrong; the sentence names it.
    """
    values = config.to_dict()
    for key, value in parse_overrides(overrides).items():
        section, dot, entry = key.partition(".")
        values = _merge(values, {section: {entry: value}} if dot else {_section_of(key): {key: value}})
    return Config.from_dict(values, source=config.name)


def replace_model(config: ModelConfig, overrides: Mapping[str, Any]) -> ModelConfig:
    """Copy of a model configuration with some fields changed.

    Raises:
        InputError: unknown field (with close names) or wrong type.
    """
    changed = _build(ModelConfig, {**_plain(dataclasses.asdict(config)), **overrides}, "model override")
    _check_model(changed, "model override")
    return changed


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' (did you mean A or B?)' with the closest known names, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read configuration {path}: {error.strerror or error}") from error
    except RecursionError as error:
        raise InputError(f"{path} is not a configuration: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not valid YAML of plain values: {reason}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: a configuration must be a mapping with the keys base, model, data, train")
    return values


def parse_overrides(overrides: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """{"section.key": value} of strings "section.key=value" with the value in YAML; a mapping is returned as it is.

    Raises:
        InputError: a string of another form.
    """
    if isinstance(overrides, Mapping):
        return dict(overrides)
    items: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or "." not in key:
            raise InputError(f"override '{text}' must be written section.key=value, e.g. train.epochs=24")
        try:
            items[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"override '{text}': the value is not valid YAML") from error
    return items


def _section_of(key: str) -> str:
    names = {entry.name: name for name, section in SECTIONS.items() for entry in dataclasses.fields(section)}
    if key not in names:
        raise InputError(f"unknown setting '{key}'{did_you_mean(key, names)}")
    return names[key]


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _check_keys(values: Any, known: Sequence[str], source: str) -> None:
    if not isinstance(values, Mapping):
        raise InputError(f"{source}: expected a mapping, got {type(values).__name__}")
    for key in values:
        if key not in known:
            raise InputError(f"{source}: unknown key '{key}'{did_you_mean(str(key), known)}")


def _build(cls: type, values: Mapping[str, Any], source: str) -> Any:
    hints = typing.get_type_hints(cls)
    _check_keys(values, list(hints), source)
    return cls(**{key: _convert(value, hints[key], f"{source}.{key}") for key, value in values.items()})


def _convert(value: Any, kind: Any, source: str) -> Any:
    """`value` as the annotated type; int is accepted for float, list for tuple, '1e-4' (YAML 1.1) for float."""
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        if isinstance(value, (list, tuple)):
            if items[-1] is Ellipsis:
                return tuple(_convert(item, items[0], source) for item in value)
            if len(items) == len(value):
                return tuple(_convert(item, item_kind, source) for item, item_kind in zip(value, items, strict=True))
    elif kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    name = kind.__name__ if isinstance(kind, type) and not isinstance(kind, types.GenericAlias) else str(kind)
    raise InputError(f"{source} must be {name}, got {_shown(value)}")


def _shown(value: Any) -> str:
    """A value for a message; a few anchors make a YAML list that would be gigabytes long if it were written out."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 1, 200, 200
    return short.repr(value)


def _check_model(model: ModelConfig, source: str) -> None:
    if not len(model.grid_sizes) == len(model.scale_ranges) == len(model.area_thresholds) == 5:
        raise InputError(
            f"{source}: grid_sizes, scale_ranges and area_thresholds must have 5 entries, one per FPN level"
        )
    _check_choice(model.head_norm, ("group", "batch"), f"{source}: head_norm")
    _check_choice(model.channel_order, ("rgb", "bgr"), f"{source}: channel_order")
    _check_choice(model.nms_kernel, ("gaussian", "linear"), f"{source}: nms_kernel")
    if not 0 <= model.frozen_stages <= 4:
        raise InputError(f"{source}: frozen_stages must lie between 0 and 4, got {model.frozen_stages}")
    if model.num_classes < 1:
        raise InputError(f"{source}: num_classes must be at least 1, got {model.num_classes}")


def _check_values(config: Config, source: str) -> None:
    _check_model(config.model, f"{source}: model")
    train = config.train
    _check_choice(train.optimizer, ("sgd", "adamw"), f"{source}: train.optimizer")
    _check_choice(train.schedule, ("step", "cosine"), f"{source}: train.schedule")
    _check_choice(train.precision, ("float32", "bf16", "fp16"), f"{source}: train.precision")
    _check_choice(train.memory_format, ("auto", "channels_last", "contiguous"), f"{source}: train.memory_format")
    _check_choice(train.nonfinite, ("stop", "skip"), f"{source}: train.nonfinite")
    if not 0 <= train.ema_decay < 1:
        raise InputError(f"{source}: train.ema_decay must be at least 0 and below 1, got {train.ema_decay}")
    if train.checkpoint_steps < 0:
        raise InputError(f"{source}: train.checkpoint_steps must be 0 or more, got {train.checkpoint_steps}")
    at_least_one = ("epochs", "batch_size", "reference_batch_size", "accumulate", "log_every")
    for key in (*at_least_one, "checkpoint_every", "keep_checkpoints", "stall_seconds"):
        if getattr(train, key) < 1:
            raise InputError(f"{source}: train.{key} must be at least 1, got {getattr(train, key)}")
    if train.learning_rate <= 0:
        raise InputError(f"{source}: train.learning_rate must be positive, got {train.learning_rate}")
    if not config.data.train_scales:
        raise InputError(f"{source}: data.train_scales needs at least one short edge")
    if config.data.workers < 0:
        raise InputError(f"{source}: data.workers must be 0 or more, got {config.data.workers}")


def _check_choice(value: str, choices: Sequence[str], source: str) -> None:
    if value not in choices:
        raise InputError(f"{source} must be one of {', '.join(choices)}, got '{value}'")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
