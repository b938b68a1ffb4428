"""Every setting rejects invalid values, wherever they come from; the message has its name, its range and the value."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import yaml

import solov2
from solov2.config import (
    SECTIONS,
    SETTING_NAMES,
    Config,
    ModelConfig,
    TrainConfig,
    list_models,
    load_config,
    override_config,
)
from solov2.errors import InputError
from solov2.models.resnet import ARCHITECTURES
from solov2.settings import PostprocessSettings, rules

# (setting, value, words in the message besides the setting)
INVALID = [
    ("train.clip_norm", -1, "at least 0 -1"),
    ("train.learning_rate", math.nan, "above 0 nan"),
    ("train.learning_rate", math.inf, "finite above 0 inf"),
    ("train.learning_rate", "fast", "number above 0 'fast'"),
    ("train.momentum", 5, "at least 0 below 1 5"),
    ("train.warmup_steps", -5, "at least 0 -5"),
    ("train.weight_decay", -1, "at least 0 -1"),
    ("train.ema_decay", math.nan, "at least 0 below 1 nan"),
    ("train.seed", 1e20, "integer 0 9223372036854775807 1e+20"),
    ("train.seed", "1e20", "integer 0 9223372036854775807 '1e20'"),
    ("train.epochs", 10**400, "integer at least 1"),
    ("train.epochs", None, "integer at least 1 null"),
    ("train.epochs", True, "integer at least 1 true"),
    ("train.step_epochs", [11, 8], "ascending [11, 8]"),
    ("train.step_epochs", [8, 8], "ascending [8, 8]"),
    ("train.stall_seconds", 3_000_000, "1 1000000 3000000"),
    ("train.picture_images", -1, "at least 0 -1"),
    ("train.pretrained_backbone", "", "text ''"),
    ("data.flip_probability", 7, "0 to 1 7"),
    ("data.train_scales", [-3], "1 32768 [-3]"),
    ("data.train_scales", [], "at least one []"),
    ("data.train_scales", 800, "list of integers 800"),
    ("data.root", "a\0b", "without NUL"),
    ("model.mask_threshold", 2, "0 to 1 2"),
    ("model.score_threshold", 9, "0 to 1 9"),
    ("model.max_instances", -3, "at least 0 -3"),
    ("data.workers", -1, "integer at least 0 auto -1"),
    ("data.workers", 1.5, "integer at least 0 auto 1.5"),
    ("data.workers", "all", "integer at least 0 auto 'all'"),
    ("model.center_sigma", -1, "0 to 1 -1"),
    ("model.pixel_std", [0, 0, 0], "3 above 0 [0, 0, 0]"),
    ("model.pixel_std", (1, 0, 1), "3 above 0 [1, 0, 1]"),
    ("model.grid_sizes", [0, 36, 24, 16, 12], "5 integers 1 1000 [0, 36, 24, 16, 12]"),
    ("model.grid_sizes", (40, 36), "5 integers [40, 36]"),
    ("model.area_thresholds", [8], "5 [8.0]"),
    ("model.tower_depth", 0, "1 100 0"),
    ("model.deformable_tower_convs", 5, "0 4 5"),
    ("model.fpn_channels", 0, "1 16384 0"),
    ("model.fpn_channels", 10**20, "1 16384 100000000000000000000"),
    ("model.tower_channels", 48, "32 48"),
    ("model.mask_hidden_channels", 1, "32 1"),
    ("model.mask_feature_channels", 100, "32 100"),
    ("model.input_scale", [0, 0], "2 integers 1 32768 [0, 0]"),
    ("model.input_scale", (800, 1333), "long short [800, 1333]"),
    ("model.scale_ranges", [[96, 1], *[[1, 96]] * 4], "min below max [[96.0, 1.0], [1.0, 96.0],"),
    ("model.scale_ranges", [[1, 96]], "5 lists of 2 [[1, 96]]"),
    ("model.frozen_stages", 5, "0 to 4 5"),
    ("model.backbone", "resnet152", "resnet50 resnet101 'resnet152'"),
]  # fmt: skip


def refused(action: Callable[[], Any], *words: str) -> str:
    """The message of the InputError, which must be one line and contain the given words."""
    with pytest.raises(InputError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


@pytest.mark.parametrize(("name", "value", "words"), INVALID)
def test_invalid_values_are_rejected(name: str, value: Any, words: str) -> None:
    section, _, entry = name.partition(".")
    refused(lambda: SECTIONS[section](**{entry: value}), name, *words.split())
    refused(lambda: override_config(Config(), {name: value}), f"solov2_r50_fpn_1x: {name}", *words.split())


def test_values_that_contradict_each_other() -> None:
    refused(lambda: ModelConfig(tower_depth=2, deformable_tower_convs=3), "model.deformable_tower_convs", "2", "3")
    refused(
        lambda: ModelConfig(backbone="resnext101_64x4d", backbone_width=8), "model.backbone_width", "at least 16", "8"
    )
    assert ModelConfig(head_norm="batch", tower_channels=24, mask_hidden_channels=8, mask_feature_channels=12)
    assert ModelConfig(backbone="resnet10", backbone_width=8) and ModelConfig(input_scale=(64, 64))


def test_every_way_to_set_a_value_validates_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train: {momentum: 5}\n")
    refused(lambda: load_config(path), "mine.yaml: train.momentum", "below 1", "5")
    refused(lambda: load_config("quickstart", ["train.momentum=5"]), "quickstart: train.momentum", "below 1", "5")
    refused(lambda: override_config(Config(), {"momentum": 5}), "train.momentum", "below 1", "5")
    refused(lambda: TrainConfig(momentum=5), "train.momentum", "below 1", "5")
    refused(lambda: dataclasses.replace(TrainConfig(), momentum=5), "train.momentum", "below 1", "5")
    refused(lambda: solov2.train("quickstart", momentum=5, output=tmp_path / "run"), "train.momentum", "below 1", "5")
    assert not (tmp_path / "run").exists()
    refused(lambda: solov2.build_model("quickstart", score_threshold=9), "model.score_threshold", "0 to 1", "9")
    model = solov2.build_model("quickstart", input_scale=(32, 32))
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    refused(lambda: model.predict([image], score_threshold=9), "model.score_threshold", "0 to 1", "9")
    with torch.no_grad():
        raw = model(torch.zeros(1, 3, 32, 32))
    refused(
        lambda: model.postprocess(raw, [(32, 32)], [(32, 32)], score_threshold=9),
        "model.score_threshold", "0 to 1", "9",
    )  # fmt: skip
    refused(lambda: PostprocessSettings(nms_kernel="box"), "model.nms_kernel", "gaussian", "linear", "'box'")


def fields() -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """(section.name, field, annotated type) of every setting."""
    for section, cls in SECTIONS.items():
        kinds = typing.get_type_hints(cls)
        for entry in dataclasses.fields(cls):
            yield f"{section}.{entry.name}", entry, kinds[entry.name]


# So that no invalid value violates another rule first, and no valid one contradicts a default.
BASE = Config(model=ModelConfig(head_norm="batch"))


def set_to(name: str, value: Any) -> Any:
    """The value of a setting after setting it."""
    section, _, entry = name.partition(".")
    return getattr(getattr(override_config(BASE, {name: value}), section), entry)


def wrong_types(kind: Any) -> list[Any]:
    wrong: list[Any] = [None, {"a": 1}, [None], [[[1]]], object()]
    if kind is not bool:
        wrong += [True, False]
    if kind in (int, float):
        wrong += ["many", "", [1]]
    if kind is int:
        wrong += [1.5, "1"]
    if kind is str or kind is bool or typing.get_origin(kind) is Literal:
        wrong += [1, 0.5]
    if typing.get_origin(kind) is tuple:
        wrong += [1, "1, 2", [True]]
    return wrong


def with_number(value: Any, number: float, *, last: bool) -> Any:
    """`number`, or a copy of the nested list `value` with its first or last number replaced."""
    if not isinstance(value, tuple):
        return number
    changed = [list(item) if isinstance(item, tuple) else item for item in value]
    place = -1 if last else 0
    changed[place] = with_number(value[place], number, last=last)
    return changed


def number_type(kind: Any) -> type | None:
    """int or float for numbers and nested lists of numbers, None for anything else."""
    while typing.get_origin(kind) in (tuple, types.UnionType, typing.Union):
        kind = typing.get_args(kind)[0]
    return kind if kind in (int, float) else None


EVERY_SETTING = pytest.mark.parametrize(
    ("name", "entry", "kind"), [pytest.param(*each, id=each[0]) for each in fields()]
)


@EVERY_SETTING
def test_types_and_choices(name: str, entry: dataclasses.Field, kind: Any) -> None:
    assert entry.metadata["doc"], f"{name} has no doc"
    assert set_to(name, entry.default) == entry.default
    for value in wrong_types(kind):
        refused(lambda value=value: set_to(name, value), name, "must be", "got")
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        refused(lambda: set_to(name, "nonsense"), name, "'nonsense'", *choices)
        assert all(set_to(name, choice) == choice for choice in choices)
    if entry.metadata["length"] or (typing.get_origin(kind) is tuple and typing.get_args(kind)[-1] is not Ellipsis):
        refused(lambda: set_to(name, [*entry.default, entry.default[0]]), name, f"list of {len(entry.default)}")


@EVERY_SETTING
def test_bounds(name: str, entry: dataclasses.Field, kind: Any) -> None:
    """Values on both sides of each bound, the bound itself, NaN and infinity."""
    wanted = number_type(kind)
    if wanted is None:
        return
    limits = {limit: entry.metadata[limit] for limit in ("minimum", "maximum", "above", "below")}
    bad, good = [math.nan, math.inf, -math.inf], []
    for limit, bound in limits.items():
        if bound is not None:
            steps = (
                [bound - 1, bound + 1] if wanted is int else [math.nextafter(bound, x) for x in (-math.inf, math.inf)]
            )
            outside, inside = steps if limit in ("minimum", "above") else steps[::-1]
            bad += [outside] if limit in ("minimum", "maximum") else [outside, bound]
            good += [inside, bound] if limit in ("minimum", "maximum") else [inside]
    assert limits["minimum"] is not None or limits["above"] is not None, f"{name} has no lower bound"
    for value in bad:
        for last in (False, True):
            given = with_number(entry.default, value, last=last)
            words = [str(bound) for bound in limits.values() if bound is not None]
            refused(lambda given=given: set_to(name, given), name, *words, str(value))
    for value in good:
        # A long edge must not be shorter than the short edge, nor a maximum less than its minimum.
        last = (name == "model.input_scale" and value < 800) or (name == "data.scale_jitter" and value > 1)
        given = with_number(entry.default, value, last=last)
        assert plain(set_to(name, given)) == plain(given)


def plain(value: Any) -> Any:
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def test_numbers_are_converted() -> None:
    """Lists, integers, 1e-4 as YAML 1.1 reads it (text), numpy scalars, and paths."""
    train = TrainConfig(learning_rate="1e-4", clip_norm=35, seed=np.int64(3), momentum=np.float32(0.5), step_epochs=[2])
    assert (train.learning_rate, train.clip_norm, train.momentum, train.step_epochs) == (1e-4, 35.0, 0.5, (2,))
    assert type(train.clip_norm) is type(train.momentum) is float and type(train.seed) is int
    assert TrainConfig(pretrained_backbone=Path("a/b.pth")).pretrained_backbone == "a/b.pth"
    model = ModelConfig(scale_ranges=[[1, 2]] * 5)
    assert model.scale_ranges == ((1.0, 2.0),) * 5 and isinstance(model.area_thresholds[0], float)
    assert hash(model) == hash(ModelConfig(scale_ranges=((1, 2),) * 5))


def test_limits_that_zero_disables() -> None:
    limits = "clip_norm checkpoint_steps max_candidates max_instances evaluate_every ema_decay workers".split()
    config = override_config(Config(), dict.fromkeys(limits, 0))
    assert config.model.max_instances == config.train.clip_norm == config.data.workers == 0


def test_backbone_choices_are_the_implemented_ones() -> None:
    assert typing.get_args(rules(ModelConfig)["backbone"].kind) == tuple(ARCHITECTURES)


def test_every_named_configuration_survives_a_yaml_round_trip() -> None:
    for name in list_models():
        config = load_config(name)
        assert Config.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_long_values_are_truncated_in_messages() -> None:
    """A few YAML anchors can make a list that would print as gigabytes."""
    bomb: list[Any] = ["x" * 1000]
    for _ in range(30):
        bomb = [bomb] * 10
    for value in (bomb, "x" * 10**6, [list(range(10**5))] * 1000, np.zeros((100, 100))):
        assert len(refused(lambda value=value: override_config(Config(), {"train.epochs": value}), "epochs")) < 6000


def test_the_reference_page_is_the_generated_one(repo_root: Path) -> None:
    spec = importlib.util.spec_from_file_location("generate", repo_root / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for name, page in generate.PAGES.items():
        assert (repo_root / "docs" / name).read_text() == page(), f"docs/{name} is stale: run python docs/generate.py"
    text = generate.configuration_page()
    assert all(f"| `{name.partition('.')[2]}` |" in text for name in SETTING_NAMES)
    assert "gaussian, linear" in text and "| `momentum` | a number of at least 0 and below 1 | `0.9` |" in text
