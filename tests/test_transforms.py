"""Resizing, flips and transposition keep image, masks and boxes consistent; randomness depends only on the position."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.data import Dataset

from solov2.data.transforms import (
    EvalTransform,
    TrainTransform,
    TransformedDataset,
    drop_flat_instances,
    flip_sample,
    resize_sample,
    seeded_generator,
    transpose_sample,
)
from solov2.ops.encoded_masks import EncodedMasks
from solov2.ops.masks import encode_rle, masks_to_boxes

BOXES = torch.tensor([[3.0, 5, 20, 12], [0, 0, 30, 40], [10, 20, 11, 39]])


def make_sample(height: int = 40, width: int = 30, seed: int = 0) -> dict:
    """Instances whose mask fills their box; the image is brightest inside the first one."""
    image = torch.randint(0, 100, (3, height, width), dtype=torch.uint8, generator=seeded_generator(seed))
    masks = torch.zeros(len(BOXES), height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, BOXES.int().tolist()):
        mask[y1:y2, x1:x2] = 1
    image[:, masks[0].bool()] = 200
    return {
        "image": image,
        "boxes": BOXES.clone(),
        "labels": torch.tensor([4, 0, 7]),
        "masks": masks,
        "image_id": 9,
        "original_size": (height, width),
    }


def empty_sample() -> dict:
    return {
        **make_sample(),
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 40, 30, dtype=torch.uint8),
    }


def equal(first: dict, second: dict) -> bool:
    assert first.keys() == second.keys()
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in ((first[key], second[key]) for key in first)
    )


def assert_consistent(sample: dict) -> None:
    """The boxes match the masks, and the bright pixels are those of the first mask."""
    assert torch.equal(sample["boxes"], masks_to_boxes(sample["masks"]))
    assert torch.equal(sample["image"].amin(0) >= 200, sample["masks"][0].bool())


def test_flips_and_transposition_keep_samples_consistent():
    sample = make_sample()
    for horizontal in (False, True):
        for vertical in (False, True):
            flipped = flip_sample(sample, horizontal=horizontal, vertical=vertical)
            assert_consistent(flipped)
            assert_consistent(transpose_sample(flipped))
    assert torch.equal(flip_sample(sample, horizontal=True, vertical=False)["image"], sample["image"].flip(2))
    assert torch.equal(flip_sample(sample, horizontal=False, vertical=True)["image"], sample["image"].flip(1))
    both = flip_sample(sample, horizontal=True, vertical=True)
    assert torch.equal(both["masks"], sample["masks"].flip(1, 2))
    turned = transpose_sample(sample)
    assert turned["image"].shape == (3, 30, 40) and turned["masks"].shape == (3, 30, 40)
    assert turned["original_size"] == (30, 40) and turned["boxes"][0].tolist() == [5, 3, 12, 20]


def test_flipping_twice_changes_nothing():
    sample = make_sample()
    for options in ({"horizontal": True, "vertical": False}, {"horizontal": True, "vertical": True}):
        assert equal(flip_sample(flip_sample(sample, **options), **options), sample)
    assert equal(transpose_sample(transpose_sample(sample)), sample)


def test_resize_doubles_exactly():
    resized = resize_sample(make_sample(), (80, 60))
    assert resized["image"].shape == (3, 80, 60) and resized["masks"].shape == (3, 80, 60)
    assert torch.equal(resized["boxes"], BOXES * 2)
    assert torch.equal(resized["boxes"], masks_to_boxes(resized["masks"]))
    assert resized["original_size"] == (40, 30) and resized["image_id"] == 9


def test_boxes_are_scaled_by_the_actual_factors_and_clipped():
    sample = make_sample()
    sample["boxes"] = torch.tensor([[-6.0, -4, 15, 20], [15, 10, 99, 99], [40, 1, 50, 2]])
    boxes = resize_sample(sample, (60, 40))["boxes"]  # factors 1.5 vertically, 4/3 horizontally
    assert torch.allclose(boxes, torch.tensor([[0, 0, 20, 30], [20, 15, 40, 60], [40, 1.5, 40, 3]]))


def test_inputs_are_not_changed():
    sample = make_sample()
    before = copy.deepcopy(sample)
    resized = resize_sample(sample, (20, 15))
    flip_sample(sample, horizontal=True, vertical=True)
    transpose_sample(sample)
    drop_flat_instances(resized)
    TrainTransform(scales=[20], max_size=40, dihedral=True)(sample, seeded_generator(1))
    assert equal(sample, before)


@pytest.mark.parametrize(
    "transform",
    [
        lambda sample: resize_sample(sample, (17, 50)),
        lambda sample: flip_sample(sample, horizontal=True, vertical=True),
        transpose_sample,
        drop_flat_instances,
        lambda sample: TrainTransform(scales=[20], max_size=40)(sample, seeded_generator(1)),
        EvalTransform(short=20, long=40),
    ],
)
def test_samples_without_instances(transform):
    result = transform(empty_sample())
    assert result["boxes"].shape == (0, 4) and len(result["labels"]) == 0
    assert result["masks"].shape == (0, *result["image"].shape[1:]) and result["masks"].dtype == torch.uint8


def test_instances_without_area_are_dropped():
    sample = make_sample()
    sample["boxes"][1] = torch.tensor([35.0, 3, 45, 9])  # right of the image
    result = TrainTransform(scales=[30], max_size=99, flip_probability=0)(sample, seeded_generator(0))
    assert result["labels"].tolist() == [4, 7]
    assert torch.equal(result["masks"], sample["masks"][[0, 2]]) and torch.equal(result["boxes"], BOXES[[0, 2]])


def test_train_transform_draws_every_scale_and_flip():
    transform = TrainTransform(scales=[30, 45, 60], max_size=70)
    seen = set()
    for position in range(60):
        result = transform(make_sample(), seeded_generator(0, position))
        flipped = result["boxes"][0, 0] / result["image"].shape[2] > 0.2
        seen.add((tuple(result["image"].shape[1:]), bool(flipped)))
        assert result["image"].dtype == result["masks"].dtype == torch.uint8
    sizes = [(40, 30), (60, 45), (70, 53)]  # the long edge limits 60
    assert seen == {(size, flipped) for size in sizes for flipped in (False, True)}


def test_flip_probability():
    results = [
        TrainTransform(scales=[30], max_size=99, flip_probability=probability)(make_sample(), seeded_generator(i))
        for probability in (0.0, 1.0)
        for i in range(5)
    ]
    assert all(equal(result, make_sample()) for result in results[:5])
    assert all(equal(r, flip_sample(make_sample(), horizontal=True, vertical=False)) for r in results[5:])


def test_dihedral_yields_all_eight_orientations():
    transform = TrainTransform(scales=[30], max_size=99, dihedral=True)
    results = [transform(make_sample(), seeded_generator(i)) for i in range(80)]
    for result in results:
        assert_consistent(result)
    assert len({(result["image"].shape, result["image"].contiguous().numpy().tobytes()) for result in results}) == 8


def test_eval_transform():
    result = EvalTransform(short=60, long=70)(make_sample())
    assert result["image"].shape == (3, 70, 53) and result["original_size"] == (40, 30)


def encoded(sample: dict) -> dict:
    rles = encode_rle(sample["masks"])
    return {**sample, "masks": EncodedMasks.from_segmentations(rles, tuple(sample["image"].shape[1:]))}


@pytest.mark.parametrize("max_bytes", [1, 5000, 2**30])
def test_encoded_masks_give_the_same_sample(max_bytes):
    """In every orientation and size, and whatever the number of masks that are drawn at a time."""
    transform, seen = TrainTransform(scales=[17, 30, 55], max_size=70, dihedral=True), set()
    for position in range(60):
        sample = make_sample()
        sample["masks"] = (torch.rand(3, 40, 30, generator=seeded_generator(position)) < 0.1).to(torch.uint8)
        sample["masks"][:, :, : position // 3], sample["boxes"][1, 2:] = 0, -5  # the second instance is dropped
        expected, found = (transform(x, seeded_generator(position)) for x in (sample, encoded(sample)))
        assert found["masks"].shape == tuple(expected["masks"].shape) and len(found["masks"]) == 2
        masks, extents = (torch.cat(parts) for parts in zip(*found["masks"].chunks(max_bytes)))
        assert equal({**found, "masks": masks}, expected)
        assert torch.equal(extents, masks_to_boxes(masks).long())
        seen.add(masks.shape)
    assert len(seen) == 6


def test_encoded_masks_are_drawn_a_few_at_a_time():
    masks = encoded(make_sample())["masks"].resize((20, 15))
    assert [len(planes) for planes, _ in masks.chunks(2 * 20 * 15)] == [2, 1]
    assert [len(planes) for planes, _ in masks.chunks(1)] == [1, 1, 1]
    ((planes, extents),) = encoded(empty_sample())["masks"].resize((20, 15)).chunks(1)
    assert planes.shape == (0, 20, 15) and extents.shape == (0, 4)


class Samples(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        return make_sample(seed=index)


def test_randomness_comes_from_seed_epoch_and_position_only():
    transform = TrainTransform(scales=[30, 35, 40, 45, 50], max_size=99, dihedral=True)

    def samples(seed: int, epoch: int) -> list[dict]:
        dataset = TransformedDataset(Samples(), transform, seed=seed)
        return [dataset[0, epoch, position] for position in range(12)]

    reference = samples(3, 1)
    torch.manual_seed(99)
    assert all(equal(a, b) for a, b in zip(reference, samples(3, 1)))
    for other in (samples(4, 1), samples(3, 2)):
        assert sum(equal(a, b) for a, b in zip(reference, other)) < 6
    assert sum(equal(a, reference[0]) for a in reference) < 6


def test_plain_index_is_epoch_0_at_its_own_position():
    dataset = TransformedDataset(Samples(), TrainTransform(scales=[30, 40, 50], max_size=99), seed=0)
    assert len(dataset) == 4
    assert all(equal(dataset[index], dataset[index, 0, index]) for index in range(4))


def test_seeds_are_hashed():
    draws = {
        torch.rand(1, generator=seeded_generator(*values)).item()
        for values in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1), (10, 0, 0), (1, 0), (0,)]
    }
    assert len(draws) == 8
