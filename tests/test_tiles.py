"""Prediction in tiles: a photograph of 24 megapixels has the instances that are seen in the whole, each once."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from solov2.errors import InputError
from solov2.models.solov2 import SOLOv2
from solov2.ops.masks import encode_rle, masks_to_boxes
from solov2.ops.rle import cropped, ious, mirrored, placed, union, voted, window
from solov2.settings import PostprocessSettings
from solov2.tiles import Fragment, join_fragments, predict_tiles, tile_boxes

COARSE = 8  # pixels of the photograph for a pixel that the detector looks at


class Detector(torch.nn.Module):
    """Finds every patch of one color, with its red channel as the score and its green channel as the class."""

    semantic_head: Any = None
    divisor = 32
    device = torch.device("cpu")
    settings = PostprocessSettings(area_thresholds=(1.0,))
    input_scale = (1333, 800)

    def load_batch(self, images: Sequence[Tensor]) -> dict[str, Tensor]:
        sizes = torch.tensor([image.shape[1:] for image in images])
        return {"pixels": torch.stack(list(images)), "sizes": sizes, "original_sizes": sizes}

    def normalize(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        return pixels

    def forward(self, images: Tensor) -> dict[str, Any]:
        return {"images": images}

    def postprocess(self, raw: dict[str, Any], sizes: Tensor, original_sizes: Tensor, **_: Any) -> list[dict[str, Any]]:
        return [self.find(image) for image in raw["images"]]

    def find(self, image: Tensor) -> dict[str, Any]:
        seen = image[:, ::COARSE, ::COARSE].int()
        keys = seen[0] * 65536 + seen[1] * 256 + seen[2]
        found = sorted((key for key in keys.unique().tolist() if key), reverse=True)
        rles, boxes = [], []
        for key in found:
            plane = (keys == key).repeat_interleave(COARSE, 0).repeat_interleave(COARSE, 1)[None]
            rles += encode_rle(plane[:, : image.shape[1], : image.shape[2]])
            boxes.append(masks_to_boxes(plane)[0])
        scores = torch.tensor([(key >> 16) / 255 for key in found])
        labels = torch.tensor([key >> 8 & 255 for key in found], dtype=torch.int64)
        return {"scores": scores, "labels": labels, "masks": rles, "boxes": torch.stack(boxes) if boxes else boxes}


def photograph(boxes: Iterable[tuple[int, int, int, int]]) -> Tensor:
    """4000 x 6000 pixels with ellipses in these boxes; three classes."""
    pixels = torch.zeros(3, 4000, 6000, dtype=torch.uint8)
    for number, (x1, y1, x2, y2) in enumerate(boxes):
        rows = torch.linspace(-1, 1, y2 - y1)[:, None] ** 2
        inside = rows + torch.linspace(-1, 1, x2 - x1) ** 2 <= 1
        color = torch.tensor([250 - number, number % 3, number + 1], dtype=torch.uint8)
        pixels[:, y1:y2, x1:x2] = torch.where(inside, color[:, None, None], pixels[:, y1:y2, x1:x2])
    return pixels


@pytest.mark.parametrize("overlap", [None, 40])
def test_no_instance_is_cut_and_none_is_twice(overlap: int | None) -> None:
    """Objects at all borders and corners, one longer than a tile; an overlap of 40 pixels holds none of them."""
    boxes = [(x, y, x + 560, y + 640) for y in range(0, 3400, 680) for x in range(0, 5400, 1200)]
    boxes += [(0, 3480, 5900, 3960)]  # across all columns of tiles
    pixels, model = photograph(boxes), Detector().eval()
    whole = model.find(pixels)
    assert len(whole["masks"]) == len(boxes) == 26
    tiled = predict_tiles(model, pixels, 1200, overlap=overlap)  # type: ignore[arg-type]
    assert len(tiled["masks"]) == 26
    assert tiled["scores"].tolist() == whole["scores"].tolist() and tiled["labels"].tolist() == whole["labels"].tolist()
    assert ious(whole["masks"], tiled["masks"]).diagonal().min() > 0.95  # tiles start between the coarse pixels
    assert (tiled["boxes"] - whole["boxes"]).abs().max() <= COARSE


def test_memory_is_bounded() -> None:
    """One plane of a photograph for each of these 90 instances would take 2.2 GB."""
    boxes = [(x, y, x + 280, y + 280) for y in range(0, 3600, 400) for x in range(0, 6000, 600)]
    pixels, model = photograph(boxes), Detector().eval()
    tracemalloc.start()
    tiled = predict_tiles(model, pixels, 1500)  # type: ignore[arg-type]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(tiled["masks"]) == len(boxes) == 90 and peak < 100e6


def test_a_photograph_within_one_tile_is_predicted_as_ever() -> None:
    pixels, model = photograph([(10, 10, 300, 200), (400, 20, 500, 90)])[:, :240, :600], Detector().eval()
    whole, tiled = model.find(pixels), predict_tiles(model, pixels, 640)  # type: ignore[arg-type]
    assert tiled["masks"] == whole["masks"] and (tiled["boxes"] == whole["boxes"]).all()
    empty = predict_tiles(model, torch.zeros(3, 100, 900, dtype=torch.uint8), 300)  # type: ignore[arg-type]
    assert empty["masks"] == [] and empty["boxes"].shape == (0, 4) and empty["labels"].dtype == torch.int64


def test_tile_boxes() -> None:
    assert tile_boxes((100, 80), 100, 25) == [(0, 0, 80, 100)]
    assert tile_boxes((100, 250), 100, 25) == [(0, 0, 100, 100), (75, 0, 175, 100), (150, 0, 250, 100)]
    for side in range(101, 400, 7):
        boxes = tile_boxes((side, 50), 100, 30)
        assert boxes[0][1] == 0 and boxes[-1][3] == side and {y2 - y1 for _, y1, _, y2 in boxes} == {100}
        assert all(first[3] - second[1] >= 30 for first, second in zip(boxes, boxes[1:]))


def fragment(score: float, label: int, columns: slice, *, is_cut: bool) -> Fragment:
    plane = torch.zeros(1, 20, 100, dtype=torch.uint8)
    plane[0, 5:15, columns] = 1
    [rle] = encode_rle(plane)
    return Fragment(score, label, rle, window(rle)[1], is_cut)


@pytest.mark.parametrize(
    ("left", "right", "labels", "is_cut", "expected"),
    [
        ((10, 60), (40, 90), (1, 1), True, [(0.9, 10, 90)]),  # one object, cut on both sides
        ((42, 56), (42, 58), (1, 1), False, [(0.9, 42, 56)]),  # found whole twice: the better one
        ((42, 56), (42, 58), (1, 2), False, [(0.9, 42, 56), (0.8, 42, 58)]),  # classes differ
        ((10, 45), (52, 90), (1, 1), True, [(0.9, 10, 45), (0.8, 52, 90)]),  # two objects
        ((10, 60), (55, 90), (1, 1), True, [(0.9, 10, 60), (0.8, 55, 90)]),  # overlap too little in the strip
    ],
)
def test_the_rule(
    left: tuple[int, int],
    right: tuple[int, int],
    labels: tuple[int, int],
    is_cut: bool,
    expected: list[tuple[float, int, int]],
) -> None:
    """Two tiles share the columns 40 to 60."""
    first = fragment(0.9, labels[0], slice(*left), is_cut=is_cut)
    second = fragment(0.8, labels[1], slice(*right), is_cut=is_cut)
    result = join_fragments([[first], [second]], [(0, 0, 60, 20), (40, 0, 100, 20)])
    rows = zip(result["scores"].tolist(), result["boxes"].tolist())
    assert [(round(score, 3), box[0], box[2]) for score, box in rows] == expected


def test_what_is_refused() -> None:
    model = Detector().eval()
    for tile, overlap in ((31, None), (100, 100), (100, -1)):
        with pytest.raises(InputError, match="tile"):
            predict_tiles(model, torch.zeros(3, 50, 50, dtype=torch.uint8), tile, overlap=overlap)  # type: ignore[arg-type]
    model.semantic_head = object()
    with pytest.raises(InputError, match="panoptic"):
        predict_tiles(model, torch.zeros(3, 50, 50, dtype=torch.uint8), 100)  # type: ignore[arg-type]
    assert SOLOv2.divisor == Detector.divisor


def test_operations_on_rles() -> None:
    """Each is what numpy does with the planes; empty masks stay empty."""
    rng = np.random.default_rng(0)
    planes = rng.random((6, 12, 17)) > 0.7
    planes[0], planes[1, :, 9:] = False, False
    rles = encode_rle(torch.from_numpy(planes))

    def encoded(plane: np.ndarray) -> dict[str, Any]:
        return encode_rle(torch.from_numpy(np.ascontiguousarray(plane))[None])[0]

    for plane, rle in zip(planes, rles):
        assert mirrored(rle)[0] == encoded(plane[:, ::-1])
        assert cropped(rle, (3, 2, 11, 9)) == encoded(plane[2:9, 3:11])
        large = np.zeros((30, 40), dtype=bool)
        large[5:17, 20:37] = plane
        moved, box = placed(rle, (5, 20), (30, 40))
        assert moved == encoded(large) and box == tuple(masks_to_boxes(torch.from_numpy(large)[None])[0].tolist())
    assert union(rles[1:3])[0] == encoded(planes[1] | planes[2])
    weights = [0.9, 0.5, 0.2, 0.7]
    expected = np.tensordot(weights, planes[:4], 1) > sum(weights) / 2
    assert voted(rles[:4], weights)[0] == encoded(expected)
    assert voted(rles[:1], [1.0]) == (encoded(planes[0]), (0, 0, 0, 0))
    assert ious(rles[:2], rles)[0].tolist() == [0] * 6 and ious(rles[1:2], rles)[0, 1] == 1
