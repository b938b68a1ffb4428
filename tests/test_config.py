"""Typed configuration: files, overrides, and error messages."""

from __future__ import annotations

import re
from dataclasses import fields, replace

import pytest

from solov2.config import (
    SETTING_NAMES,
    Config,
    DataConfig,
    ModelConfig,
    TrainConfig,
    config_folder,
    find_config,
    list_models,
    load_config,
    override_config,
    replace_model,
)
from solov2.errors import InputError
from solov2.suggestions import OTHER_NAMES, did_you_mean

PUBLISHED = {
    "solov2_r50_fpn_1x", "solov2_r50_fpn_3x", "solov2_r101_fpn_3x", "solov2_r101_dcn_fpn_3x", "solov2_x101_dcn_fpn_3x",
    "solov2_light_r18_fpn_3x", "solov2_light_r34_fpn_3x", "solov2_light_r50_fpn_3x", "solov2_light_r50_dcn_fpn_3x",
    "solov2_panoptic_r50_fpn_1x", "solov2_panoptic_r50_fpn_3x", "solov2_panoptic_r101_fpn_3x",
    "solov2_r50_fpn_3x_plus", "solov2_light_r50_fpn_3x_plus",
}  # fmt: skip


def test_all_named_configurations_load_and_stay_small():
    assert set(list_models()) == PUBLISHED | {"quickstart", "quickstart_panoptic"}
    for name in list_models():
        assert load_config(name).name == name
        assert name == "quickstart" or len(find_config(name).read_text().splitlines()) <= 25


def test_reference_recipes():
    """SEMANTICS sections 1 and 6."""
    full, light = load_config("solov2_r50_fpn_1x"), load_config("solov2_light_r50_fpn_3x")
    assert (full.train.epochs, full.train.step_epochs, full.train.warmup_start) == (12, (8, 11), 0.001)
    assert full.data.train_scales == (800,) and full.model.input_scale == (1333, 800)
    assert (full.train.learning_rate, full.train.momentum, full.train.weight_decay) == (0.01, 0.9, 1e-4)
    assert (full.train.clip_norm, full.train.reference_batch_size) == (35.0, 16)
    assert (light.train.epochs, light.train.step_epochs) == (36, (27, 33))
    assert light.train.warmup_start == pytest.approx(1 / 3)
    assert light.data.train_scales == (512, 480, 448, 416, 384, 352) and light.data.train_long_edge == 768
    assert light.model.input_scale == (768, 448) and light.model.scale_ranges[-1] == (224, 896)


def test_file_over_base_and_overrides(tmp_path):
    (tmp_path / "base.yaml").write_text("train: {epochs: 3, seed: 5}\n")
    path = tmp_path / "mine.yaml"
    path.write_text("base: base.yaml\ntrain: {epochs: 4}\n")
    config = load_config(path, ["train.learning_rate=1e-3", "model.grid_sizes=[4, 3, 2, 2, 1]"])
    assert (config.name, config.train.epochs, config.train.seed) == ("mine", 4, 5)
    assert config.train.learning_rate == 1e-3 and config.model.grid_sizes == (4, 3, 2, 2, 1)
    assert override_config(config, {"train.epochs": 9}).train.epochs == 9


def test_round_trip_through_plain_types():
    config = load_config("solov2_light_r18_fpn_3x")
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {epoch: 3}", ["epoch", "epochs"]),
        ("modell: {}", ["modell", "model"]),
        ("train: {epochs: many}", ["train.epochs", "integer", "many"]),
        ("train: {epochs: true}", ["train.epochs"]),
        ("train: {epochs: 0}", ["epochs", "at least 1"]),
        ("model: {input_scale: [1, 2, 3]}", ["input_scale"]),
        ("model: {grid_sizes: [40, 36]}", ["grid_sizes", "5 integers"]),
        ("model: {head_norm: layer}", ["head_norm", "group, batch"]),
        ("train: {precision: fp8}", ["precision", "bf16"]),
        ("train: [1]", ["train", "mapping"]),
        ("train: []", ["train", "mapping"]),
        ("name: [1]", ["name", "text"]),
        *(
            (f"name: '{name}'", ["name", "got"])
            for name in ("../../x", "", ".", "..", "a/b", "/x", "a\\b", " a", "x" * 201)
        ),
        ('name: "a\\eb"', ["name", "a file name"]),
        ('name: "\\ud800"', ["name", "a file name"]),
        ("train: {num_classes: 4}", ["train.num_classes", "model.num_classes"]),
        ("epochs: 4", ["epochs", "train.epochs"]),
        ("base: ''", ["base", "mine.yaml"]),
        ("base: [1]", ["base", "[1]"]),
        ("base: " + 5000 * "x", ["base", "xxx"]),
        ("base: solov2_r50_fpn", ["base", "solov2_r50_fpn_1x"]),
        ("base: mine.yaml", ["mine.yaml -> ", "circular"]),
        ("model: {'a\\nb': 1}", ["unknown", "model.a"]),
        ("train: &x {epochs: *x}", ["train.epochs", "integer"]),
        ("- 1", ["mapping"]),
        ("train: {epochs: 3", ["not valid YAML"]),
        ("x: !!python/object/apply:os.system ['true']", ["not valid YAML"]),
        ("base: other.yaml", ["other.yaml"]),
    ],
)
def test_error_messages_are_one_line_with_the_key(tmp_path, text, words):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load_config(path)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_bases_to_any_depth(tmp_path):
    """Bases are relative to the file that names them; the last one is a model; the first file gives the name."""
    (tmp_path / "deep").mkdir()
    texts = {
        "a.yaml": "base: deep/b.yaml\ntrain: {epochs: 1}\n",
        "deep/b.yaml": "base: c.yml\nname: b\ntrain: {epochs: 2, seed: 2}\n",
        "deep/c.yml": f"base: {tmp_path / 'd.yaml'}\ntrain: {{seed: 3, log_every: 3}}\n",
        "d.yaml": "base: quickstart\nname: d\ntrain: {log_every: 4, warmup_steps: 4}\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    config, base = load_config(tmp_path / "a.yaml"), load_config("quickstart")
    train = config.train
    assert (train.epochs, train.seed, train.log_every, train.warmup_steps) == (1, 2, 3, 4)
    assert config.name == "a" and (config.model, config.data) == (base.model, base.data)
    assert train.learning_rate == base.train.learning_rate


@pytest.mark.parametrize("name", sorted(PUBLISHED | {"quickstart", "quickstart_panoptic"}))
def test_every_model_is_a_base(tmp_path, name):
    for base in (name, f"{name}.yaml", f"configs/{name}.yaml", config_folder() / f"{name}.yaml"):
        (tmp_path / "mine.yaml").write_text(f"base: {base}\n")
        assert replace(load_config(tmp_path / "mine.yaml"), name=name) == load_config(name)


def test_circular_bases_are_rejected(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    for name, base in (("a", "b"), ("b", "link/c"), ("c", "b")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}.yaml\n")
    with pytest.raises(InputError) as error:
        load_config(tmp_path / "link" / "a.yaml")
    assert re.search(r"a\.yaml -> .*b\.yaml -> .*c\.yaml -> .*b\.yaml$", str(error.value))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("lr", "train.learning_rate"),
        ("bs", "train.batch_size"),
        ("amp", "train.precision"),
        ("max_epochs", "train.epochs"),
        ("img_size", "model.input_scale or data.train_scales"),
        ("num_workers", "data.workers"),
        ("grad_clip", "train.clip_norm"),
        ("conf_thres", "model.score_threshold"),
        ("max_det", "model.max_instances"),
        ("nc", "model.num_classes"),
        ("num_classes", "model.num_classes"),
        ("learning-rate", "train.learning_rate"),
        ("Epochs", "train.epochs"),
        ("score_treshold", "model.score_threshold"),
    ],
)
def test_names_of_other_libraries_and_sections(typed, meant):
    """In whichever section the name is typed."""
    assert did_you_mean(typed, SETTING_NAMES) == f" (did you mean {meant}?)"
    for section in ("train", "data"):
        with pytest.raises(InputError, match=re.escape(f"'{section}.{typed}' (did you mean {meant}?)")):
            load_config("quickstart", [f"{section}.{typed}=1"])


def test_suggestions_for_flags():
    flags = ["--learning-rate", "--batch-size", "--precision"]
    assert did_you_mean("--lr", flags) == " (did you mean --learning-rate?)"
    assert did_you_mean("--batch-sise", flags) == " (did you mean --batch-size?)"
    assert did_you_mean("--zzz", flags) == did_you_mean("--img-size", flags) == ""


def test_other_names_stand_for_ours():
    ours = {name.partition(".")[2] for name in SETTING_NAMES}
    assert OTHER_NAMES.keys() <= ours
    assert not ours & {other for others in OTHER_NAMES.values() for other in others.split()}


def test_unknown_names_list_close_ones():
    with pytest.raises(InputError, match=r"did you mean .*solov2_r50_fpn_1x"):
        load_config("solov2_r50_fpn")
    with pytest.raises(InputError, match="does not exist"):
        load_config("missing.yaml")
    with pytest.raises(InputError, match="did you mean score_threshold"):
        replace_model(ModelConfig(), {"score_treshold": 0.3})
    with pytest.raises(InputError, match="section.key=value"):
        load_config("quickstart", ["epochs"])


def test_every_setting_survives_a_round_trip_through_plain_types():
    defaults = Config().to_dict()
    for section, cls in (("model", ModelConfig), ("data", DataConfig), ("train", TrainConfig)):
        assert set(defaults[section]) == {entry.name for entry in fields(cls)}
    assert Config.from_dict(defaults) == Config()


def test_checkpoints_of_other_versions_may_have_unknown_training_keys():
    """Unknown keys of `data` and `train` are ignored; unknown keys of `model` are rejected."""
    values = load_config("quickstart").to_dict()
    values["train"]["channels_last"], values["data"]["gone"] = True, 1
    assert Config.from_checkpoint(values, "old.pth") == load_config("quickstart")
    values["model"]["unheard_of"] = 1
    with pytest.raises(InputError, match="old.pth.*unheard_of"):
        Config.from_checkpoint(values, "old.pth")


def test_checkpoints_of_other_versions_may_have_values_that_are_now_invalid(caplog):
    """Settings that do not affect weights fall back to defaults, with a warning; a negative limit means no limit."""
    values = load_config("quickstart").to_dict()
    values["train"] |= {"clip_norm": -1, "warmup_steps": -5}
    values["model"] |= {"max_instances": -1, "max_candidates": -1}
    config = Config.from_checkpoint(values, "old.pth")
    assert re.findall(r"old.pth: train.(\w+)", caplog.text) == ["warmup_steps", "clip_norm"]
    assert (config.train.clip_norm, config.train.warmup_steps) == (35.0, 500)
    assert (config.model.max_instances, config.model.max_candidates) == (0, 0)
    values["model"]["tower_depth"] = 0
    with pytest.raises(InputError, match="old.pth.*tower_depth"):
        Config.from_checkpoint(values, "old.pth")


@pytest.mark.parametrize("name", ["größe", "my run (2)", "v1.2", "7", ".hidden"])
def test_names_of_folders(tmp_path, name):
    (tmp_path / "mine.yaml").write_text(f"name: {name}\n")
    assert load_config(tmp_path / "mine.yaml").name == name


def test_checkpoints_may_have_a_name_that_is_now_invalid(caplog):
    config = Config.from_checkpoint({**load_config("quickstart").to_dict(), "name": "../../x"}, "old.pth")
    assert config.name == "solov2_r50_fpn_1x" and "old.pth: name" in caplog.text
