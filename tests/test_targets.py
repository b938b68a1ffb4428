"""Target assignment matches the reference cell by cell, and its contract holds in edge cases."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch
from helpers.parity import instances
from helpers.training_parity import SCENES, TARGETS, assert_targets, scene_assigner

from solov2.ops.encoded_masks import EncodedMasks
from solov2.ops.masks import encode_rle
from solov2.targets import TargetAssigner


def test_all_scenes_are_present() -> None:
    assert len(SCENES) == TARGETS["stats"]["scenes"] == 55
    assert sum(len(scene["labels"]) for scene in SCENES.values()) == TARGETS["stats"]["gts"]


@pytest.mark.parametrize("ranges", TARGETS["scale_ranges"])
@pytest.mark.parametrize("name", SCENES)
def test_cells_categories_and_masks(name: str, ranges: str) -> None:
    assert_targets(SCENES[name], ranges)


def test_a_batch_concatenates_its_images() -> None:
    """Images are numbered and instances are numbered across the batch; everything else is per image."""
    by_size = sorted(SCENES.values(), key=lambda scene: scene["pad_shape"])
    padded, scenes = max(
        ((size, list(group)) for size, group in groupby(by_size, lambda scene: scene["pad_shape"])),
        key=lambda item: len(item[1]),
    )
    truths = [instances(scene) for scene in scenes[:6]]
    assert len(truths) > 2
    together, offset = scene_assigner("full")(truths, tuple(padded)), 0
    positives = together["positives"].split(together["positives_per_image"])
    masks = together["masks"].split(together["instances_per_image"])
    for i, truth in enumerate(truths):
        alone = scene_assigner("full")([truth], tuple(padded))
        assert torch.equal(together["category"][i], alone["category"][0])
        assert torch.equal(positives[i], alone["positives"] + torch.tensor([i, 0, offset]))
        assert torch.equal(masks[i], alone["masks"])
        offset += len(truth["labels"])


def square(x: int, y: int, side: int, *, size: tuple[int, int] = (64, 96)) -> dict[str, torch.Tensor]:
    """One instance: a filled square with its tight box."""
    mask = torch.zeros(1, *size, dtype=torch.uint8)
    mask[:, y : y + side, x : x + side] = 1
    return {
        "boxes": torch.tensor([[x, y, x + side, y + side]], dtype=torch.float32),
        "labels": torch.tensor([2]),
        "masks": mask,
    }


def nothing(size: tuple[int, int] = (64, 96)) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, *size, dtype=torch.uint8),
    }


def small_assigner() -> TargetAssigner:
    return TargetAssigner((8, 4), [(1, 20), (10, 100)], num_classes=3)


def test_shapes_and_dtypes_without_instances() -> None:
    for truths in ([nothing(), nothing()], [nothing(), square(20, 10, 12)]):
        targets = small_assigner()(truths, (64, 96))
        count = sum(len(truth["labels"]) for truth in truths)
        assert targets["category"].shape == (2, 80) and targets["category"].dtype == torch.int64
        assert targets["positives"].shape[1] == 3 and targets["positives"].dtype == torch.int64
        assert targets["masks"].shape == (count, 16, 24) and targets["masks"].dtype == torch.uint8
        assert (targets["category"][0] == 3).all()
        assert targets["positives_per_image"] == torch.bincount(targets["positives"][:, 0], minlength=2).tolist()
    assert (targets["positives"][:, 0] == 1).all() and (targets["positives"][:, 2] == 0).all()


def test_bool_masks() -> None:
    """As in torchvision and in the results of `SOLOv2.predict`."""
    truth = square(20, 10, 31)
    wanted = small_assigner()([truth], (64, 96))
    targets = small_assigner()([{**truth, "masks": truth["masks"].bool()}], (64, 96))
    assert wanted["masks"].sum() > 0 and len(wanted["positives"]) > 0
    assert all(torch.equal(targets[name], wanted[name]) for name in ("category", "positives", "masks"))


def test_an_instance_without_a_visible_pixel_gets_no_cell() -> None:
    truth = square(20, 10, 12)
    truth["masks"].zero_()
    targets = small_assigner()([truth], (64, 96))
    assert len(targets["positives"]) == 0 and (targets["category"] == 3).all()
    assert targets["masks"].shape == (1, 16, 24)


def test_scale_ranges_include_their_bounds() -> None:
    for side, levels in ((9, [0]), (10, [0, 1]), (20, [0, 1]), (21, [1])):
        cells = small_assigner()([square(20, 10, side)], (64, 96))["positives"][:, 1]
        assert sorted({int(cell >= 64) for cell in cells}) == levels


def test_a_later_instance_takes_the_category_and_both_keep_their_masks() -> None:
    first, second = square(20, 10, 12), square(20, 10, 12)
    second["labels"] = torch.tensor([0])
    both = {key: torch.cat([first[key], second[key]]) for key in first}
    targets = small_assigner()([both], (64, 96))
    assert set(targets["category"].unique().tolist()) == {0, 3}
    _, cells, owners = targets["positives"].T
    assert cells[owners == 0].tolist() == cells[owners == 1].tolist()
    assert len(owners) == 2 * (targets["category"] == 0).sum()


def test_targets_refer_to_the_padded_size() -> None:
    """Cells and masks refer to the padded size, whatever the image's own size."""
    large, small = small_assigner()([square(20, 10, 12)], (64, 96)), square(20, 10, 12, size=(30, 40))
    padded = small_assigner()([small], (64, 96))
    for key in ("category", "positives", "masks"):
        assert torch.equal(padded[key], large[key])


@pytest.mark.parametrize("chunk_bytes", [1, 2**30])
def test_encoded_masks_give_the_same_targets(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    """Whatever the number that is drawn at a time; an empty mask gets no cell although its box has an area."""
    monkeypatch.setattr(EncodedMasks.chunks, "__defaults__", (chunk_bytes,))
    truth, other = square(20, 10, 12), square(50, 30, 20)
    truth = {key: torch.cat([truth[key], truth[key], other[key]]) for key in truth}
    truth["masks"][1] = 0
    for given in (truth, nothing()):
        encoded = EncodedMasks.from_segmentations(encode_rle(given["masks"]), (64, 96))
        expected, targets = (small_assigner()([x], (64, 96)) for x in (given, {**given, "masks": encoded}))
        for key in ("category", "positives", "masks"):
            assert torch.equal(targets[key], expected[key])
    assert set(small_assigner()([truth], (64, 96))["positives"][:, 2].tolist()) == {0, 2}


def test_instances_are_left_untouched() -> None:
    truth = square(20, 10, 12)
    copies = {key: value.clone() for key, value in truth.items()}
    small_assigner()([truth], (64, 96))
    assert all(torch.equal(truth[key], copies[key]) for key in truth)


def test_grid_sizes_and_scale_ranges_must_match() -> None:
    with pytest.raises(ValueError, match="2 grid sizes but 1 scale ranges"):
        TargetAssigner((8, 4), [(1, 20)], num_classes=3)
