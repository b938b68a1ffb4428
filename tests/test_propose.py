"""Proposals: what changes, what stays, and that what the user named wins."""

from __future__ import annotations

from typing import Any

import pytest

from solov2.config import Config, load_config
from solov2.proposal.propose import Change, data_facts, propose
from tests.helpers.coco_files import annotation, image_entry

CONFIG = load_config("solov2_light_r18_fpn_3x")


def content(images: int, side: float, per_image: int = 2, size: tuple[int, int] = (640, 480)) -> dict[str, Any]:
    """`per_image` squares of `side` px in each of some images."""
    width, height = size
    annotations = []
    for image in range(1, images + 1):
        for number in range(per_image):
            x, y = 37 * number % (width - side), 53 * number % (height - side)
            annotations.append(annotation(len(annotations) + 1, image, 1, (x, y, side, side)))
    entries = [image_entry(number, width=width, height=height) for number in range(1, images + 1)]
    return {"images": entries, "annotations": annotations, "categories": [{"id": 1, "name": "car"}]}


def proposed(
    data: dict[str, Any], config: Config = CONFIG, *, weights: bool = False, processes: int = 1, chosen: tuple = ()
) -> tuple[Config, dict[str, Change]]:
    facts = data_facts({"train": data, "val": data}, config)
    result, changes = propose(CONFIG, config, facts, chosen=chosen, weights=weights, processes=processes)
    return result, {change.setting: change for change in changes}


@pytest.mark.parametrize(
    "images, weights, processes, epochs",
    [(60, True, 1, 100), (60, False, 1, 200), (60, True, 5, 300), (4, True, 1, 300), (4000, True, 1, 12)],
)
def test_the_number_of_epochs_follows_from_optimizer_steps(images, weights, processes, epochs) -> None:
    train = proposed(content(images, 80), weights=weights, processes=processes)[0].train
    assert train.epochs == epochs
    steps = epochs * -(-images // (train.batch_size * processes))
    assert train.warmup_steps == min(500, steps // 10)
    assert train.step_epochs == (round(0.75 * epochs), round(33 / 36 * epochs))
    assert 10 <= epochs / train.evaluate_every <= 20 and train.checkpoint_every == train.evaluate_every


def test_portrait_and_landscape_images_fill_batches_of_their_own() -> None:
    """As in training: 10 and 10 images in batches of 8 are 2 and 2 steps, not 20 / 8."""
    data = content(20, 80)
    for entry in data["images"][::2]:
        entry |= {"width": 320, "height": 480}
    for groups, steps in ((2, 4), (1, 3)):
        config = load_config("solov2_light_r18_fpn_3x", ["train.batch_size=8", f"data.aspect_groups={groups}"])
        _, changes = proposed(data, config, weights=True)
        assert changes["train.epochs"].reason.startswith(f"of {steps} steps")


def test_a_large_dataset_gets_no_more_epochs_than_a_short_recipe_has() -> None:
    config = load_config("solov2_r50_fpn_1x", ["train.batch_size=16"])
    train = proposed(content(6000, 80), config)[0].train
    assert train.epochs == 16 and train.warmup_steps == 500  # 6,000 steps of 375


def test_sizes_stay_where_they_fit() -> None:
    config, changes = proposed(content(60, 80))
    assert config.model == CONFIG.model and config.data == CONFIG.data
    assert not [name for name in changes if not name.startswith("train.")]


def test_tiny_instances_get_a_larger_input_and_other_ranges() -> None:
    config, changes = proposed(content(60, 7))
    assert config.model.input_scale[1] == max(config.data.train_scales) > 800
    assert {"model.input_scale", "model.scale_ranges", "data.train_scales"} <= changes.keys()
    scale = 7 * config.model.input_scale[1] / 480
    assert config.model.scale_ranges[0][0] <= scale <= config.model.scale_ranges[0][1]


def test_crowds_of_instances_raise_the_limits() -> None:
    config, changes = proposed(content(30, 30, per_image=250))
    assert config.data.max_detections == config.model.max_instances == 300
    assert changes["data.max_detections"].value == 300


def test_a_batch_is_no_larger_than_the_dataset() -> None:
    config = load_config("solov2_light_r18_fpn_3x", ["train.batch_size=16"])
    assert proposed(content(5, 80), config)[0].train.batch_size == 5
    assert proposed(content(5, 80), config, processes=2)[0].train.batch_size == 2


def test_what_the_user_named_wins() -> None:
    chosen = ("train.epochs", "warmup_steps", "data.max_detections", "model.grid_sizes")
    config = load_config("solov2_light_r18_fpn_3x", ["train.epochs=20"])
    result, changes = proposed(content(60, 30, per_image=250), config, chosen=chosen)
    assert result.train.epochs == 20 and result.train.warmup_steps == CONFIG.train.warmup_steps
    assert result.data.max_detections == 100 and result.model.grid_sizes == CONFIG.model.grid_sizes
    assert result.train.step_epochs == (15, 18)  # of the 20 epochs
    assert not {"train.epochs", "train.warmup_steps", "data.max_detections", "model.grid_sizes"} & changes.keys()


def test_every_change_is_a_setting_with_a_reason() -> None:
    result, changes = proposed(content(60, 7, per_image=250))
    values = result.to_dict()
    for name, change in changes.items():
        section, key = name.split(".")
        assert change.reason and "\n" not in change.reason
        value = list(change.value) if isinstance(change.value, tuple) else change.value
        assert values[section][key] == value and values[section][key] != CONFIG.to_dict()[section][key]


def test_crowd_regions_do_not_count() -> None:
    data = content(60, 80)
    for entry in data["annotations"][::2]:
        entry |= {"iscrowd": 1, "bbox": [0, 0, 600, 400]}
    facts = data_facts({"train": data, "val": data}, CONFIG)
    assert len(facts.instances.scales) == 60 and facts.images == 60
    assert facts.instances.scales.max() == pytest.approx(80 * 512 / 480)
