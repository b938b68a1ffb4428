"""A configuration: YAML files over `base:` files, overrides, and a sentence for every mistake.

A YAML file names only what differs from its base, or else from the defaults. What each setting takes stands beside it
in `solov2.sections`, and `solov2.settings` holds every value against it.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from solov2.errors import InputError
from solov2.sections import DataConfig, ModelConfig, TrainConfig
from solov2.settings import PostprocessSettings, Rule, Settings, rules, shown
from solov2.suggestions import did_you_mean

SECTIONS: dict[str, type[Settings]] = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
SETTING_NAMES = [f"{section}.{entry.name}" for section, cls in SECTIONS.items() for entry in dataclasses.fields(cls)]
WEIGHT_SUFFIXES = (".pth", ".pt", ".ckpt", ".pkl", ".safetensors")
KEYS = ["base", "name", *SECTIONS]  # of a file


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
            InputError: unknown key (with the nearest match), a value that its setting does not take, or values that
                contradict each other.
        """
        name = values.get("name", cls.name)
        try:
            for key in values:
                if key not in KEYS[1:]:
                    raise _unknown(key, [*KEYS, *SETTING_NAMES])
            name = Rule(str).check(str(name) if isinstance(name, (int, float)) else name, "name")
            return cls(name, **{section: _build(section, values.get(section)) for section in SECTIONS})
        except InputError as error:
            raise InputError(f"{source}: {error}") from error

    @classmethod
    def from_checkpoint(cls, values: Mapping[str, Any], source: str) -> Config:
        """The configuration that a checkpoint of an older or newer version carries.

        Keys of `data` and `train` that this version does not know are passed over, they change no weight, and a value
        that it does not take gives way to the default, with a warning. The model's must all be known and right.

        Raises:
            InputError: as `from_dict`.
        """
        kept = dict(values)
        for name in ("data", "train"):
            if isinstance(kept.get(name), Mapping):
                kept[name] = dict(_taken(name, kept[name], source))
        if isinstance(kept.get("model"), Mapping):  # below 0 meant no limit once
            limits = {key: 0 for key in ("max_candidates", "max_instances") if _below_zero(kept["model"].get(key))}
            kept["model"] = {**kept["model"], **limits}
        return cls.from_dict(kept, source)


def _taken(section: str, values: Mapping[str, Any], source: str) -> Iterator[tuple[str, Any]]:
    """The settings of a section that this version knows and takes."""
    known = rules(SECTIONS[section])  # type: ignore[arg-type]  # takes __hash__ for that of the class
    for key, value in values.items():
        if key in known:
            try:
                yield key, known[key].check(value, f"{section}.{key}")
            except InputError as error:
                warnings.warn(f"{source}: {error}; its default is used", stacklevel=3)


def _below_zero(value: Any) -> bool:
    return isinstance(value, int) and value < 0


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
    if path.suffix in WEIGHT_SUFFIXES:
        raise InputError(f"{path} is no model name or YAML file; weights are given as weights (--weights {path})")
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
        name: model name (`list_models`) or path of a YAML file. The file may name another by `base:`, by a path
            relative to itself or as here, and that one another; its own values win.
        overrides: {"section.key": value} or strings "section.key=value" with the value in YAML.

    Raises:
        InputError: file, key, type or value is wrong, or the bases go in a circle; the sentence names it.
    """
    path = find_config(name)
    values = {"name": path.stem, **_read_with_bases(path)}
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
        InputError: unknown field (with close names), or a value that it does not take.
    """
    known = [entry.name for entry in dataclasses.fields(ModelConfig)]
    for key in overrides:
        if key not in known:
            raise _unknown(key, [*known, *(name for name in SETTING_NAMES if not name.startswith("model."))])
    return dataclasses.replace(config, **overrides)


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
        items[key.strip()] = _parse_yaml(value, f"override '{text}'")
    return items


def _section_of(key: str) -> str:
    sections = {name.partition(".")[2]: name.partition(".")[0] for name in SETTING_NAMES}
    if key not in sections:
        raise _unknown(key, sections)
    return sections[key]


def _build(section: str, values: Any) -> Any:
    if not isinstance(values, (Mapping, type(None))):
        raise InputError(f"{section} must be a mapping of settings, got {shown(values)}")
    for key in values or {}:
        if f"{section}.{key}" not in SETTING_NAMES:
            raise _unknown(f"{section}.{key}", SETTING_NAMES)
    return SECTIONS[section](**values or {})


def _unknown(key: str, known: Iterable[str]) -> InputError:
    return InputError(f"unknown setting {shown(key)}{did_you_mean(str(key), known)}")


def _read_with_bases(path: Path) -> dict[str, Any]:
    """The values of a file over those of its base, over those of the base's base, and so on."""
    values, files = _read_yaml(path), [path]
    while (base := values.pop("base", None)) is not None:
        files.append(_find_base(base, files[-1]))
        if files[-1].resolve() in [file.resolve() for file in files[:-1]]:
            raise InputError(f"{path}: its bases go in a circle: {' -> '.join(map(str, files))}")
        below = _read_yaml(files[-1])
        below.pop("name", None)
        values = _merge(below, values)
    return values


def _find_base(base: Any, path: Path) -> Path:
    if not isinstance(base, str):
        raise InputError(f"{path}: base must be the name of a model or a file, got {shown(base)}")
    beside = path.parent / base
    try:
        return beside if beside.is_file() else find_config(base)
    except (InputError, OSError) as error:  # is_file raises where a folder may not be entered
        raise InputError(f"{path}: base: {error}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read configuration {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not valid YAML: {error}") from error
    values = _parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: a configuration must be a mapping with the keys base, model, data, train")
    return values


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except RecursionError as error:
        raise InputError(f"{source} is not a configuration: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{source} is not valid YAML of plain values: {' '.join(str(error).split())}") from error


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Sections are merged, everything else is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = {**merged[key], **value} if both else value
    return merged


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
