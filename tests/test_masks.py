"""Boxes, centers and encodings of masks."""

from __future__ import annotations

import json

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch

import solov2.ops.masks
from solov2.errors import InputError
from solov2.ops.masks import (
    _first_and_last,
    _first_and_last_numpy,
    centers_of_mass,
    check_segmentation,
    decode_rle,
    draw_window,
    encode_rle,
    masks_to_boxes,
    run_lengths,
    segmentation_to_mask,
    segmentations_to_masks,
)

SQUARE = [1.0, 1.0, 5.0, 1.0, 5.0, 4.0, 1.0, 4.0]


@pytest.fixture
def masks() -> torch.Tensor:
    """Noise, an empty mask, single pixels in two corners, a full mask, a column."""
    masks = torch.zeros(6, 11, 17, dtype=torch.uint8)
    masks[0] = torch.rand(11, 17, generator=torch.Generator().manual_seed(0)) < 0.2
    masks[2, 0, 0] = 1
    masks[3, 10, 16] = 1
    masks[4] = 1
    masks[5, 2:9, 4] = 1
    return masks


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_boxes(masks, dtype):
    boxes = masks_to_boxes(masks.to(dtype))
    assert boxes.dtype == torch.float32
    assert boxes[1:].tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [16, 10, 17, 11], [0, 0, 17, 11], [4, 2, 5, 9]]
    ys, xs = masks[0].nonzero().unbind(1)
    assert boxes[0].tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_boxes_on_an_accelerator(masks):
    """The operations used for masks on an accelerator, run on the host."""
    for axis in (1, 2):
        occupied = masks.amax(axis)
        assert torch.stack(_first_and_last(occupied)).tolist() == _first_and_last_numpy(occupied.numpy() > 0).tolist()


def test_boxes_of_no_masks_and_no_pixels():
    assert masks_to_boxes(torch.zeros(0, 5, 5, dtype=torch.bool)).shape == (0, 4)
    assert masks_to_boxes(torch.zeros(2, 0, 5, dtype=torch.bool)).tolist() == [[0.0] * 4] * 2


def test_centers(masks):
    y, x, area = centers_of_mass(masks)
    assert y.dtype == x.dtype == torch.float32
    assert area.dtype == torch.int64 and torch.equal(area, masks.sum((1, 2)))
    assert y[1:].tolist() == [0, 0, 10, 5, 5] and x[1:].tolist() == [0, 0, 16, 8, 4]
    ys, xs = masks[0].nonzero().unbind(1)
    assert y[0] == ys.sum().float() / len(ys) and x[0] == xs.sum().float() / len(xs)
    for again in (centers_of_mass(masks.mT.contiguous().mT), centers_of_mass(masks, masks_to_boxes(masks).long())):
        assert all(map(torch.equal, again, (y, x, area)))


def test_centers_are_integer_sums():
    # Sums far above 2^24: accumulating in float32 would lose the last bits of some of these centers.
    masks = (torch.rand(8, 500, 1300, generator=torch.Generator().manual_seed(1)) < 0.7).to(torch.uint8)
    for mask, y, x, _ in zip(masks, *centers_of_mass(masks)):
        ys, xs = mask.nonzero().unbind(1)
        assert y == ys.sum().float() / len(ys) and x == xs.sum().float() / len(xs)


def test_centers_of_very_long_masks():
    masks = torch.ones(1, 1, 70_001, dtype=torch.uint8)  # more than 16 bits of pixels in one row
    assert [value.item() for value in centers_of_mass(masks)[:2]] == [0, 35_000]
    assert [value.item() for value in centers_of_mass(masks.mT)[:2]] == [35_000, 0]


def test_no_centers():
    assert [len(value) for value in centers_of_mass(torch.zeros(0, 5, 5, dtype=torch.uint8))] == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_rle_equals_pycocotools(masks, dtype):
    rles = encode_rle(masks.to(dtype))
    for rle, mask in zip(rles, masks.numpy()):
        expected = coco_mask.encode(np.asfortranarray(mask))
        assert rle == {"size": [11, 17], "counts": expected["counts"].decode()}
    assert json.loads(json.dumps(rles)) == rles
    assert torch.equal(torch.stack([decode_rle(rle) for rle in rles]), masks)


def test_rle_of_any_memory_order(masks):
    assert encode_rle(masks.mT.contiguous().mT) == encode_rle(masks)
    assert encode_rle(masks.repeat_interleave(2, dim=0)[::2]) == encode_rle(masks)
    assert encode_rle(torch.zeros(0, 5, 5, dtype=torch.bool)) == []


@pytest.mark.parametrize("budget", [1, 2 * 11 * 17, 2**30])
def test_rle_in_chunks(masks, monkeypatch, budget):
    expected = encode_rle(masks)
    monkeypatch.setattr(solov2.ops.masks, "CHUNK_BYTES", budget)
    sizes = []
    encode = coco_mask.encode
    monkeypatch.setattr(coco_mask, "encode", lambda planes: sizes.append(planes.shape[2]) or encode(planes))
    assert encode_rle(masks) == expected
    assert sizes == {1: [1] * 6, 2 * 11 * 17: [2] * 3, 2**30: [6]}[budget]


def test_windows_are_tight(masks):
    for lengths, mask, box in zip(
        run_lengths(encode_rle(masks), (11, 17)), masks, masks_to_boxes(masks).int().tolist()
    ):
        window, found = draw_window(lengths, 11)
        x1, y1, x2, y2 = found
        assert list(found) == box and np.array_equal(window.T, mask[y1:y2, x1:x2].numpy())


def test_decode_accepts_every_kind_of_counts():
    expected = torch.zeros(4, 5, dtype=torch.uint8)
    expected[1:3, 1] = 1  # down the columns: 4 + 1 zeros, 2 ones, the rest
    counts = encode_rle(expected[None])[0]["counts"]
    for kind in (counts, counts.encode(), [5, 2, 13]):
        decoded = decode_rle({"size": [4, 5], "counts": kind})
        assert decoded.dtype == torch.uint8 and torch.equal(decoded, expected)


def test_polygons_are_merged():
    other = [6.0, 5.0, 9.0, 5.0, 9.0, 8.0]
    both = segmentation_to_mask([SQUARE, other], (10, 12))
    assert both.shape == (10, 12) and both.sum() > 0
    assert torch.equal(both, segmentation_to_mask([SQUARE], (10, 12)) | segmentation_to_mask([other], (10, 12)))
    assert both[2, 2] == 1 and both[6, 8] == 1 and both[9, 0] == 0


def test_segmentations_of_one_image():
    mask = segmentation_to_mask([SQUARE], (10, 12))
    rle = encode_rle(mask[None])[0]
    counts = [13, 3, 104]
    masks, extents = segmentations_to_masks([[SQUARE], rle, {"size": [10, 12], "counts": counts}], (10, 12))
    assert masks.shape == (3, 10, 12) and masks.dtype == torch.uint8
    assert torch.equal(masks[0], mask) and torch.equal(masks[1], mask)
    assert masks[2].sum() == 3 and masks[2, 3:6, 1].all()
    assert extents.tolist() == [[1, 1, 5, 4], [1, 1, 5, 4], [1, 3, 2, 6]]
    masks, extents = segmentations_to_masks([], (10, 12))
    assert masks.shape == (0, 10, 12) and extents.shape == (0, 4) and extents.dtype == torch.int64


def test_decoding_equals_pycocotools(masks):
    noise = torch.rand(40, 11, 17, generator=torch.Generator().manual_seed(1)) < torch.linspace(0, 1, 40)[:, None, None]
    masks = torch.cat([masks, noise.to(torch.uint8)])
    rles = encode_rle(masks)
    decoded, extents = segmentations_to_masks(rles, (11, 17))
    assert np.array_equal(decoded.numpy(), coco_mask.decode(rles).transpose(2, 0, 1))
    assert torch.equal(extents, masks_to_boxes(masks).long())


@pytest.mark.parametrize("counts", [[12], [3, 0, 9], [3, 0, 9, 0], [0, 12], [0, 0, 2, 4, 6], [5, 1, 0, 2, 4], [11, 1]])
def test_runs_of_length_zero(counts):
    rle = {"size": [3, 4], "counts": counts}
    (mask,), extents = segmentations_to_masks([rle], (3, 4))
    assert np.array_equal(mask.numpy(), coco_mask.decode(coco_mask.frPyObjects(rle, 3, 4)))
    assert torch.equal(extents, masks_to_boxes(mask[None]).long())


def test_short_polygons_are_ignored_next_to_valid_ones():
    expected = segmentation_to_mask([SQUARE], (10, 12))
    for polygons in ([[1, 2, 3, 4], SQUARE], [SQUARE, [7, 7, 8, 8]], [[], SQUARE]):
        assert torch.equal(segmentation_to_mask(polygons, (10, 12)), expected)


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([[1, 1, 5, 5]], "three points"),
        ([[1, 1, 5, 5], []], "three points"),
        ([[1, 1, 5, 5, 3]], "even number"),
        ([[1, 1, 5, 5, 3, float("nan")]], "finite"),
        ([[1, 1, 5, 5, 3, "4"]], "list of numbers"),
        ([1, 1, 5, 5, 3, 3], "list of numbers"),
        ([], "list of polygons or an RLE"),
        (None, "list of polygons or an RLE"),
        ("abc", "list of polygons or an RLE"),
        ({"counts": [120]}, "size None"),
        ({"size": [12, 10], "counts": [120]}, r"\[12, 10\].*\[10, 12\]"),
        ({"size": [10, 12]}, "no counts"),
        ({"size": [10, 12], "counts": [5, 5]}, "add up"),
        ({"size": [10, 12], "counts": [130]}, "add up"),
        ({"size": [10, 12], "counts": [130, -10]}, "add up"),
        ({"size": [10, 12], "counts": []}, "add up"),
        ({"size": [10, 12], "counts": [2**63 - 1, 2**63 - 1, 122]}, "add up"),  # the sum overflows to 120
        ({"size": [10, 12], "counts": [[120]]}, "add up"),
        ({"size": [10, 12], "counts": ["a"]}, "integer run lengths"),
        ({"size": [10, 12], "counts": ""}, "not valid run lengths"),
        ({"size": [10, 12], "counts": "é"}, "not valid run lengths"),
        ({"size": [10, 12], "counts": "!!"}, "not valid run lengths"),
        ({"size": [10, 12], "counts": "`" * 40}, "not valid run lengths"),
        ({"size": [10, 12], "counts": "`" * 40 + "0"}, "not valid run lengths"),
    ],
)
def test_broken_segmentations(segmentation, reason):
    with pytest.raises(InputError, match=reason):
        segmentation_to_mask(segmentation, (10, 12))


def test_check_reads_compressed_counts_as_pycocotools_writes_them():
    random = np.random.RandomState(0)
    for height, width in ((1, 1), (3, 1), (480, 640), (37, 1500)):
        for share in (0.0, 0.001, 0.3, 1.0):
            mask = np.asfortranarray(random.rand(height, width) < share).astype(np.uint8, order="F")
            counts = coco_mask.encode(mask)["counts"].decode()
            check_segmentation({"size": [height, width], "counts": counts}, (height, width))
            with pytest.raises(InputError):
                check_segmentation({"size": [height + 1, width], "counts": counts}, (height + 1, width))
            with pytest.raises(InputError):
                check_segmentation({"size": [height, width], "counts": counts + "1"}, (height, width))
