"""Drawing: masks are filled, labels are complete and do not overlap, and the rest of the image does not change."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import max_pool2d

import solov2.visualize as visualize
from solov2.errors import InputError
from solov2.ops.masks import encode_rle
from solov2.visualize import CELL, FILL, contact_sheet, draw_instances, instance_color

HEIGHT, WIDTH = 300, 400
NAMES = ["cat", "dog", "traffic light"]
GRAY = Image.new("RGB", (WIDTH, HEIGHT), (120, 120, 120))


def result_of(*boxes: tuple[int, int, int, int], scores: bool = True) -> dict[str, Any]:
    """Rectangular instances, boxes as x0, y0, x1, y1."""
    masks = torch.zeros(len(boxes), HEIGHT, WIDTH, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    result = {"labels": torch.arange(len(boxes)) % len(NAMES), "masks": masks}
    return result | {"scores": torch.linspace(0.95, 0.5, len(boxes))} if scores else result


def label_rectangles(picture: Image.Image, count: int) -> list[tuple[int, int, int, int]]:
    """Box (x0, y0, x1, y1) of each label, found by the exact color of its instance, which masks only have blended."""
    pixels, found = np.array(picture), []
    for index in range(count):
        exact = (pixels == instance_color(index)).all(2)
        assert exact.sum() > 100, f"instance {index} has no visible label"
        rows, columns = (np.flatnonzero(exact.sum(axis) > 0.3 * exact.sum(axis).max()) for axis in (1, 0))
        found.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    return found


def overlap(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def test_masks_are_tinted_and_the_rest_does_not_change() -> None:
    picture = draw_instances(GRAY, result_of((100, 100, 300, 250)), NAMES)
    pixels = np.array(picture)
    expected = (1 - FILL) * 120 + FILL * np.array(instance_color(0))
    assert np.abs(pixels[175, 200] - expected).max() <= 1
    assert tuple(pixels[280, 50]) == (120, 120, 120)
    assert np.abs(pixels[249, 150] - expected).max() > 20  # the outline
    assert GRAY.getextrema() == ((120, 120),) * 3


def test_nothing_to_draw_does_not_change_the_image() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    empty = result_of() | {"boxes": torch.zeros(0, 4)}
    assert draw_instances(noise, empty, NAMES).tobytes() == noise.tobytes()
    assert draw_instances(noise, {**empty, "masks": []}, NAMES).tobytes() == noise.tobytes()
    low = result_of((10, 10, 60, 60)) | {"scores": torch.tensor([0.29])}
    assert draw_instances(noise, low, NAMES).tobytes() == noise.tobytes()
    assert draw_instances(noise, low, NAMES, score_threshold=0.2).tobytes() != noise.tobytes()


def test_an_empty_mask_is_skipped() -> None:
    both = draw_instances(GRAY, result_of((0, 0, 0, 0), (100, 100, 200, 200)), NAMES)
    pixels = np.array(both)
    assert tuple(pixels[5, 5]) == (120, 120, 120)
    assert tuple(pixels[150, 150]) != (120, 120, 120)


def test_rle_and_bool_masks_give_the_same_picture() -> None:
    result = result_of((20, 30, 200, 220), (150, 10, 390, 290))
    encoded = {**result, "masks": encode_rle(result["masks"])}
    assert draw_instances(GRAY, encoded, NAMES).tobytes() == draw_instances(GRAY, result, NAMES).tobytes()


def test_all_image_types(tmp_path: Path) -> None:
    GRAY.save(tmp_path / "gray.png")
    array = np.array(GRAY)
    forms = [tmp_path / "gray.png", str(tmp_path / "gray.png"), array, torch.from_numpy(array).permute(2, 0, 1)]
    expected = draw_instances(GRAY, result_of((20, 30, 200, 220)), NAMES).tobytes()
    for form in forms:
        assert draw_instances(form, result_of((20, 30, 200, 220)), NAMES).tobytes() == expected
    assert (array == 120).all()


def test_small_instances_are_on_top_and_keep_their_color() -> None:
    small, large = (180, 180, 230, 230), (50, 100, 350, 290)
    for boxes, rank in (((small, large), 0), ((large, small), 1)):
        pixels = np.array(draw_instances(GRAY, result_of(*boxes), NAMES)).astype(float)
        for point, color in (((210, 200), instance_color(rank)), ((270, 100), instance_color(1 - rank))):
            assert np.abs(pixels[point] - ((1 - FILL) * 120 + FILL * np.array(color))).max() <= 1


def test_labels_of_a_crowd_do_not_overlap() -> None:
    boxes = [(x, y, x + 12, y + 12) for y in (130, 150, 170) for x in (180, 200, 220)]
    rectangles = label_rectangles(draw_instances(GRAY, result_of(*boxes), NAMES), len(boxes))
    assert not any(overlap(one, other) for one, other in combinations(rectangles, 2))


@pytest.mark.parametrize("corner", [(0, 0), (WIDTH - 14, 0), (0, HEIGHT - 14), (WIDTH - 14, HEIGHT - 14)])
def test_labels_at_the_edge_are_complete(corner: tuple[int, int]) -> None:
    x, y = corner
    (edge,) = label_rectangles(draw_instances(GRAY, result_of((x, y, x + 14, y + 14)), NAMES), 1)
    (middle,) = label_rectangles(draw_instances(GRAY, result_of((200, 150, 214, 164)), NAMES), 1)
    assert (edge[2] - edge[0], edge[3] - edge[1]) == (middle[2] - middle[0], middle[3] - middle[1])
    assert overlap((edge[0] - 20, edge[1] - 20, edge[2] + 20, edge[3] + 20), (x, y, x + 14, y + 14))


def test_without_scores_all_instances_are_drawn_with_shorter_labels() -> None:
    boxes = ((100, 100, 300, 250),)
    scored = label_rectangles(draw_instances(GRAY, result_of(*boxes), NAMES), 1)[0]
    plain = label_rectangles(draw_instances(GRAY, result_of(*boxes, scores=False), NAMES, score_threshold=1.0), 1)[0]
    assert plain[2] - plain[0] < 0.7 * (scored[2] - scored[0])


def test_labels_grow_with_the_image() -> None:
    heights = []
    for scale in (1, 3):
        picture = draw_instances(GRAY, result_of((100, 100, 300, 250)), NAMES, scale=scale)
        assert picture.size == (WIDTH * scale, HEIGHT * scale)
        (rectangle,) = label_rectangles(picture, 1)
        heights.append(rectangle[3] - rectangle[1])
        assert np.array(picture)[175 * scale, 200 * scale].tolist() != [120, 120, 120]
    assert heights[1] > 1.8 * heights[0]


def test_a_tiny_image_does_not_break_the_labels() -> None:
    result = {"labels": torch.tensor([2]), "masks": torch.ones(1, 8, 10, dtype=torch.bool)}
    assert draw_instances(np.zeros((8, 10, 3), np.uint8), result, NAMES).size == (10, 8)


def test_colors_are_distinct_and_fixed() -> None:
    colors = np.array([instance_color(index) for index in range(20)], dtype=float)
    distances = [np.linalg.norm(one - other) for one, other in combinations(colors, 2)]
    assert min(distances) > 25
    neighbors = np.linalg.norm(colors[1:] - colors[:-1], axis=1)
    assert neighbors.min() > 100
    assert instance_color(1000) == instance_color(1000)


def test_invalid_arguments_are_named() -> None:
    with pytest.raises(InputError, match=r"\(300, 400\).* \(100, 100\)"):
        draw_instances(GRAY.resize((100, 100)), result_of((0, 0, 9, 9)), NAMES)
    with pytest.raises(InputError, match="label 1 .*class_names.* 1"):
        draw_instances(GRAY, result_of((0, 0, 9, 9), (20, 20, 29, 29)), NAMES[:1])
    with pytest.raises(InputError, match="at least one pair"):
        contact_sheet([])


def crowd(count: int, height: int, width: int) -> dict[str, Any]:
    """Blobs of noise anywhere, single pixels far away from them, and a full mask."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    masks[0] = True
    for mask in masks[1:]:
        y, x, size = (
            int(value * 0.7 * side) for value, side in zip(torch.rand(3, generator=generator), (height, width, 60))
        )
        mask[y : y + size, x : x + size] = torch.rand(mask[y : y + size, x : x + size].shape, generator=generator) < 0.6
        mask[-1, 0] = True
    return {"labels": torch.arange(count) % len(NAMES), "masks": masks}


def painted_plainly(image: np.ndarray, result: dict[str, Any], width: int) -> np.ndarray:
    """Fills and outlines with full-size masks in floating point, one after the other."""

    def grow(mask: np.ndarray, pixels: int) -> np.ndarray:
        plane = torch.from_numpy(mask).float()[None, None]
        return max_pool2d(plane, 2 * pixels + 1, stride=1, padding=pixels)[0, 0].bool().numpy()

    pixels, order = image.copy(), np.argsort([-int(mask.sum()) for mask in result["masks"]], kind="stable")
    instances = [(result["masks"][i].numpy(), np.asarray(instance_color(int(i)), np.float32)) for i in order]
    for mask, color in instances:
        pixels[mask] = (1 - FILL) * image[mask] + FILL * color
    for mask, color in instances:
        rim, line = grow(mask, max(1, width // 2)) & ~mask, mask & grow(~mask, width)
        pixels[rim] = 0.4 * pixels[rim] + 0.15 * color
        pixels[line] = 0.7 * color + 0.3 * 255
    return pixels


@pytest.mark.parametrize("band", [1, 16, 10**6])
def test_bands_and_crops_do_not_change_a_pixel(monkeypatch: pytest.MonkeyPatch, band: int) -> None:
    monkeypatch.setattr(visualize, "BAND", band)
    monkeypatch.setattr(visualize, "draw_labels", lambda picture, instances: None)
    image = np.random.default_rng(0).integers(0, 256, (140, 300, 3), dtype=np.uint8)
    result = crowd(8, 140, 300)
    for masks in (result["masks"], result["masks"].to(torch.uint8) * 255, encode_rle(result["masks"])):
        picture = np.array(draw_instances(image, {**result, "masks": masks}, NAMES))
        assert np.array_equal(picture, painted_plainly(image, result, width=1))
    if band == 1:
        return  # slow on a larger image
    large = np.random.default_rng(0).integers(0, 256, (720, 800, 3), dtype=np.uint8)
    result = crowd(3, 720, 800)
    assert np.array_equal(np.array(draw_instances(large, result, NAMES)), painted_plainly(large, result, width=3))


def test_drawing_keeps_no_plane_per_instance() -> None:
    height, width, count = 300, 400, 40
    rles = encode_rle(torch.ones(1, height, width)) * count  # each as large as the image
    tracemalloc.start()
    draw_instances(np.zeros((height, width, 3), np.uint8), {"labels": [0] * count, "masks": rles}, NAMES)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * height * width  # bytes


def test_contact_sheet_keeps_one_pair_of_pictures() -> None:
    alive: list[weakref.ref] = []

    def pairs() -> Iterator[tuple[Image.Image, Image.Image]]:
        for _ in range(4):
            gc.collect()
            assert sum(reference() is not None for reference in alive) <= 1
            picture = Image.new("RGB", (600, 500))
            alive.append(weakref.ref(picture))
            yield picture, picture

    contact_sheet(pairs())
    assert len(alive) == 4


def test_contact_sheet() -> None:
    wide, tall = Image.new("RGB", (200, 100), (255, 0, 0)), Image.new("RGB", (60, 120), (0, 0, 255))
    sheet = np.array(contact_sheet([(wide, wide), (tall, wide), (wide, tall)]))
    red = (sheet == (255, 0, 0)).all(2)
    blue = (sheet == (0, 0, 255)).all(2)
    assert red.sum() == 4 * CELL * CELL // 2
    assert blue.sum() == 2 * CELL * CELL // 2
    assert red[:, : sheet.shape[1] // 2].sum() == red[:, sheet.shape[1] // 2 :].sum()
    assert sheet[:16].min() < 100  # the titles
