"""Typed configuration: files, overrides, and the sentences for mistakes."""

from __future__ import annotations

from dataclasses import fields

import pytest

from solov2.config import (
    Config,
    DataConfig,
    ModelConfig,
    TrainConfig,
    find_config,
    list_models,
    load_config,
    override_config,
    replace_model,
)
from solov2.errors import InputError

PUBLISHED = {
    "solov2_r50_fpn_1x", "solov2_r50_fpn_3x", "solov2_r101_fpn_3x", "solov2_r101_dcn_fpn_3x", "solov2_x101_dcn_fpn_3x",
    "solov2_light_r18_fpn_3x", "solov2_light_r34_fpn_3x", "solov2_light_r50_fpn_3x", "solov2_light_r50_dcn_fpn_3x",
}  # fmt: skip


def test_all_named_configurations_load_and_stay_small():
    assert set(list_models()) == PUBLISHED | {"quickstart"}
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
        ("train: {epochs: many}", ["train.epochs", "int", "many"]),
        ("train: {epochs: true}", ["train.epochs"]),
        ("train: {epochs: 0}", ["epochs", "at least 1"]),
        ("model: {input_scale: [1, 2, 3]}", ["input_scale"]),
        ("model: {grid_sizes: [40, 36]}", ["grid_sizes", "5 entries"]),
        ("model: {head_norm: layer}", ["head_norm", "group, batch"]),
        ("train: {precision: fp8}", ["precision", "bf16"]),
        ("train: [1]", ["train", "mapping"]),
        ("- 1", ["mapping"]),
        ("train: {epochs: 3", ["not valid YAML"]),
        ("x: !!python/object/apply:os.system ['true']", ["not valid YAML"]),
        ("base: other.yaml", ["other.yaml"]),
    ],
)
def test_mistakes_are_one_sentence_with_the_key(tmp_path, text, words):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load_config(path)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_base_of_a_base_is_refused(tmp_path):
    for name, base in (("a", "b.yaml"), ("b", "c.yaml"), ("c", None)):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}\n" if base else "")
    with pytest.raises(InputError, match="base file cannot have a base"):
        load_config(tmp_path / "a.yaml")


def test_unknown_names_list_close_ones():
    with pytest.raises(InputError, match=r"did you mean .*solov2_r50_fpn_1x"):
        load_config("solov2_r50_fpn")
    with pytest.raises(InputError, match="does not exist"):
        load_config("missing.yaml")
    with pytest.raises(InputError, match="did you mean score_threshold"):
        replace_model(ModelConfig(), {"score_treshold": 0.3})
    with pytest.raises(InputError, match="section.key=value"):
        load_config("quickstart", ["epochs"])


def test_every_entry_has_a_type_that_the_reader_knows():
    defaults = Config().to_dict()
    for section, cls in (("model", ModelConfig), ("data", DataConfig), ("train", TrainConfig)):
        assert set(defaults[section]) == {entry.name for entry in fields(cls)}
    assert Config.from_dict(defaults) == Config()


def test_checkpoints_of_other_versions_keep_their_model():
    """A key of the recipe that was renamed since is passed over; one of the network is not."""
    values = load_config("quickstart").to_dict()
    values["train"]["channels_last"], values["data"]["gone"] = True, 1
    assert Config.from_checkpoint(values, "old.pth") == load_config("quickstart")
    values["model"]["unheard_of"] = 1
    with pytest.raises(InputError, match="old.pth.*unheard_of"):
        Config.from_checkpoint(values, "old.pth")
