"""Configurations: YAML files layered over `base:` files, overrides, and a clear error for every mistake.

A YAML file states only what differs from its base or, without one, from the defaults. `solov2.sections` declares the
type and range of every setting, and `solov2.settings` checks values against them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from solov2.errors import InputError
from solov2.sections import DataConfig, ModelConfig, TrainConfig
from solov2.settings import PanopticSettings, PostprocessSettings, Rule, Settings, format_value, invalid_value, rules
from solov2.suggestions import did_you_mean
from solov2.yaml_file import parse_yaml, read_yaml

LOG = logging.getLogger(__name__)
SECTIONS: dict[str, type[Settings]] = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
SETTING_NAMES = [f"{section}.{entry.name}" for section, cls in SECTIONS.items() for entry in dataclasses.fields(cls)]
DEFAULT_MODEL = "solov2_r50_fpn_1x"
WEIGHT_SUFFIXES = (".pth", ".pt", ".ckpt", ".pkl", ".safetensors")
MAX_AUXILIARY_CLASSES = 254  # a byte also has to hold the background and the pixels that are ignored
KEYS = ["base", "name", *SECTIONS]  # top-level keys of a file


@dataclass(frozen=True)
class Config:
    """A resolved configuration; `name` is the model name, which is also the file name without its suffix.

    By default, a run's folder has this name, so it must be a plain file name.
    """

    name: str = DEFAULT_MODEL
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        for name, wanted, value in self._contradictions():
            raise invalid_value(name, wanted, value)

    def _contradictions(self) -> Iterator[tuple[str, str, Any]]:
        """Yield (setting, what it must be, its value) where settings of two sections contradict each other."""
        model, weight = self.model, self.train.semantic_auxiliary
        if self.data.copy_paste and model.num_stuff:
            wanted = "0 for panoptic models, because instances are pasted into no semantic map"
            yield "data.copy_paste", wanted, self.data.copy_paste
        if weight and model.num_stuff:
            yield "train.semantic_auxiliary", "0 for panoptic models, which have the semantic loss already", weight
        if weight and model.num_classes > MAX_AUXILIARY_CLASSES:
            wanted = f"0 for more than {MAX_AUXILIARY_CLASSES} classes, and there are {model.num_classes}"
            yield "train.semantic_auxiliary", wanted, weight
        if weight and model.head_norm == "group" and model.semantic_channels % 32:
            yield "model.semantic_channels", "a multiple of 32, as head_norm group requires", model.semantic_channels

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionary of plain YAML/JSON types (tuples become lists)."""
        values = _plain(dataclasses.asdict(self))
        # Inherited fields come first; move them to the end.
        limits = [*dataclasses.fields(PostprocessSettings), *dataclasses.fields(PanopticSettings)]
        values["model"] |= {limit.name: values["model"].pop(limit.name) for limit in limits}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "configuration") -> Config:
        """Build and validate a configuration.

        Args:
            values: nested mapping whose keys are the fields of this class and of its sections.
            source: its name in error messages, usually the file name.

        Raises:
            InputError: unknown key (with the closest match), invalid value, or values that contradict each other.
        """
        name = values.get("name", cls.name)
        try:
            for key in values:
                if key not in KEYS[1:]:
                    raise _unknown_setting(key, [*KEYS, *SETTING_NAMES])
            return cls(
                _check_name(name), **{section: _build_section(section, values.get(section)) for section in SECTIONS}
            )
        except InputError as error:
            raise InputError(f"{source}: {error}") from error

    @classmethod
    def from_checkpoint(cls, values: Mapping[str, Any], source: str) -> Config:
        """Build the configuration stored in a checkpoint, which another version may have written.

        In `data` and `train`, which do not affect the weights, unknown keys are ignored, and an invalid value is
        replaced by the default, with a warning, and so is an invalid name. In `model`, every key must be known and
        every value valid.

        Raises:
            InputError: as for `from_dict`.
        """
        kept = dict(values)
        try:
            _check_name(kept.get("name", cls.name))
        except InputError as error:
            LOG.warning("%s: %s; using %s", source, error, cls.name)
            del kept["name"]
        for name in ("data", "train"):
            if isinstance(kept.get(name), Mapping):
                kept[name] = dict(_valid_settings(name, kept[name], source))
        if isinstance(kept.get("model"), Mapping):  # negative values used to mean no limit
            limits = {key: 0 for key in ("max_candidates", "max_instances") if _is_negative(kept["model"].get(key))}
            kept["model"] = {**kept["model"], **limits}
        return cls.from_dict(kept, source)


def _check_name(value: Any) -> str:
    name = Rule(str).check(str(value) if isinstance(value, (int, float)) else value, "name")
    if not name.isprintable() or name != name.strip() or not name.strip(".") or set(name) & set("/\\"):
        raise invalid_value("name", "a file name (by default that of the YAML file): printable, no / or \\", value)
    if len(os.fsencode(name)) > 200:
        raise invalid_value("name", "a file name (by default that of the YAML file) of at most 200 bytes", value)
    return name


def _valid_settings(section: str, values: Mapping[str, Any], source: str) -> Iterator[tuple[str, Any]]:
    """Yield the known, valid settings of a section as (key, value); warn about invalid values."""
    known = rules(SECTIONS[section])  # type: ignore[arg-type]  # mypy checks the instances' __hash__
    for key, value in values.items():
        if key in known:
            try:
                yield key, known[key].check(value, f"{section}.{key}")
            except InputError as error:
                LOG.warning("%s: %s; using the default", source, error)


def _is_negative(value: Any) -> bool:
    return isinstance(value, int) and value < 0


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """'section.key old -> new' for each setting that is in both nested dictionaries and differs."""
    changed: list[str] = []
    for key in sorted(before.keys() & now.keys()):
        if isinstance(before[key], Mapping) and isinstance(now[key], Mapping):
            changed += changed_settings(before[key], now[key], f"{prefix}{key}.")
        elif json.dumps(before[key]) != json.dumps(now[key]):  # in JSON, tuples equal lists
            changed.append(f"{prefix}{key} {json.dumps(before[key])} -> {json.dumps(now[key])}")
    return changed


def config_folder() -> Path:
    """Folder of the named configurations: inside the installed package or, in a checkout, next to it.

    Raises:
        InputError: neither folder exists.
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
    """The sorted names of all models; `build_model`, `train` and the commands accept each of them."""
    return sorted(path.stem for path in config_folder().glob("*.yaml"))


def find_config(name: str | Path) -> Path:
    """Path of the configuration with a given model name or YAML path.

    Raises:
        InputError: no such name or file; the message lists close names.
    """
    path = Path(name)
    if path.suffix in WEIGHT_SUFFIXES:
        raise InputError(f"{path} is neither a model name nor a YAML file; pass weights as weights (--weights {path})")
    if path.suffix in (".yaml", ".yml"):
        if os.path.isfile(path):  # False for names too long as well
            return path
        if os.path.isfile(config_folder() / path.name) and path.parent.name in ("", "configs"):
            return config_folder() / path.name  # `configs/NAME.yaml` typed outside the checkout
        problem = "is not a regular file" if os.path.exists(path) else "does not exist"
        raise InputError(f"configuration file {path} {problem}; available models: {', '.join(list_models())}")
    if str(name) in list_models():
        return config_folder() / f"{name}.yaml"
    raise InputError(
        f"unknown model name '{name}'{did_you_mean(str(name), list_models())}; available: {', '.join(list_models())}"
    )


def load_config(name: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Config:
    """Read a configuration by model name or path and apply overrides.

    Args:
        name: model name (`list_models`) or path of a YAML file. The file may name a base under `base:`, either as a
            path relative to itself or like this argument, and that base another one; the file's own values win.
        overrides: {"section.key": value} or strings "section.key=value" with the value in YAML.

    Raises:
        InputError: invalid file, key, type or value, or circular bases; the message names it.
    """
    path = find_config(name)
    values = {"name": path.stem, **_read_with_bases(path)}
    return override_config(Config.from_dict(values, source=path.name), overrides)


def override_config(config: Config, overrides: Mapping[str, Any] | Sequence[str]) -> Config:
    """Copy of a configuration with some settings changed.

    Args:
        config: the configuration to copy.
        overrides: {"section.key": value}; {"key": value}, since names are unique across sections; or strings
            "section.key=value" with the value in YAML.

    Raises:
        InputError: invalid key, type or value; the message names it.
    """
    values = config.to_dict()
    for key, value in parse_overrides(overrides).items():
        section, dot, entry = key.partition(".")
        values = _merge(values, {section: {entry: value}} if dot else {_section_of(key): {key: value}})
    return Config.from_dict(values, source=config.name)


def replace_model(config: ModelConfig, overrides: Mapping[str, Any]) -> ModelConfig:
    """Copy of a model configuration with some settings changed.

    Raises:
        InputError: unknown setting (with close names) or invalid value.
    """
    known = [entry.name for entry in dataclasses.fields(ModelConfig)]
    for key in overrides:
        if key not in known:
            raise _unknown_setting(key, [*known, *(name for name in SETTING_NAMES if not name.startswith("model."))])
    return dataclasses.replace(config, **overrides)


def parse_overrides(overrides: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """{"section.key": value} from strings "section.key=value" with the value in YAML; a mapping is copied.

    Raises:
        InputError: a string does not have this form.
    """
    if isinstance(overrides, Mapping):
        return dict(overrides)
    items: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or "." not in key:
            raise InputError(f"override '{text}' must have the form section.key=value, e.g. train.epochs=24")
        items[key.strip()] = parse_yaml(value, f"override '{text}'")
    return items


def _section_of(key: str) -> str:
    sections = {name.partition(".")[2]: name.partition(".")[0] for name in SETTING_NAMES}
    if key not in sections:
        raise _unknown_setting(key, sections)
    return sections[key]


def _build_section(section: str, values: Any) -> Any:
    if not isinstance(values, (Mapping, type(None))):
        raise InputError(f"{section} must be a mapping of settings, got {format_value(values)}")
    for key in values or {}:
        if f"{section}.{key}" not in SETTING_NAMES:
            raise _unknown_setting(f"{section}.{key}", SETTING_NAMES)
    return SECTIONS[section](**values or {})


def _unknown_setting(key: str, known: Iterable[str]) -> InputError:
    return InputError(f"unknown setting {format_value(key)}{did_you_mean(str(key), known)}")


def _read_with_bases(path: Path) -> dict[str, Any]:
    """The values of a file merged over those of its base, which are merged over those of its own base, and so on."""
    values, files = _read_values(path), [path]
    while (base := values.pop("base", None)) is not None:
        files.append(_find_base(base, files[-1]))
        if files[-1].resolve() in [file.resolve() for file in files[:-1]]:
            raise InputError(f"{path}: circular bases: {' -> '.join(map(str, files))}")
        base_values = _read_values(files[-1])
        base_values.pop("name", None)
        values = _merge(base_values, values)
    return values


def _find_base(base: Any, path: Path) -> Path:
    if not isinstance(base, str):
        raise InputError(f"{path}: base must be a model name or the path of a YAML file, got {format_value(base)}")
    relative = path.parent / base
    try:
        if not os.path.exists(relative) or os.path.isdir(relative):
            return find_config(base)
        if not os.path.isfile(relative):
            raise InputError(f"{relative} is not a regular file")
    except InputError as error:
        raise InputError(f"{path}: base: {error}") from error
    return relative


def _read_values(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: a configuration must be a mapping with the keys base, model, data, train")
    return values


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge sections; replace everything else."""
    merged = dict(base)
    for key, value in changes.items():
        is_section = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = {**merged[key], **value} if is_section else value
    return merged


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
