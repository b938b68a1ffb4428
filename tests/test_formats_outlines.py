"""Outlines of masks: one polygon has exactly the pixels of a mask, with its parts and holes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers.format_files import HEIGHT, WIDTH, box_mask, rle

from solov2.formats.outlines import as_one_polygon, as_polygons, ellipse, join, rectangle, trace, turned
from solov2.ops.masks import segmentation_to_mask


def drawn(polygons: list[list[float]], size: tuple[int, int]) -> np.ndarray:
    return segmentation_to_mask(polygons, size).numpy() > 0


def test_random_masks_come_back_to_the_pixel() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        size = tuple(int(side) for side in rng.integers(1, 14, 2))
        mask = rng.random(size) < rng.random()
        if mask.any():
            assert (drawn(as_polygons(rle(mask), size)[0], size) == mask).all()
            assert (drawn([as_one_polygon(rle(mask), size)[0]], size) == mask).all()


def test_parts_and_holes() -> None:
    ring = box_mask(5, 5, 20, 20) & ~box_mask(10, 10, 5, 5)
    parts, holes = trace(rle(ring | box_mask(40, 1, 3, 3)), (HEIGHT, WIDTH))
    assert len(parts) == 2 and holes == [[15, 10, 10, 10, 10, 15, 15, 15]]
    corner = box_mask(2, 2, 3, 3) | box_mask(5, 5, 3, 3)  # touch at a corner
    assert len(trace(rle(corner), (HEIGHT, WIDTH))[0]) == 2
    assert as_polygons(rle(ring), (HEIGHT, WIDTH))[1] and not as_polygons(rle(corner), (HEIGHT, WIDTH))[1]
    with_border = np.ones((HEIGHT, WIDTH), dtype=bool)
    assert trace(rle(with_border), (HEIGHT, WIDTH)) == ([[0, 0, WIDTH, 0, WIDTH, HEIGHT, 0, HEIGHT]], [])


def test_overlapping_parts_are_united() -> None:
    """The even-odd rule alone would cut out where they overlap."""
    parts = [rectangle(5, 5, 25, 20), rectangle(15, 10, 40, 30)]
    polygon, number, _ = as_one_polygon(parts, (HEIGHT, WIDTH))
    union = drawn(parts, (HEIGHT, WIDTH))
    assert number == 2 and (drawn([polygon], (HEIGHT, WIDTH)) == union).all()
    assert (drawn([join(parts)], (HEIGHT, WIDTH)) != union).any()


def test_shapes() -> None:
    size = (200, 200)
    assert drawn([ellipse(100, 100, 60, 30)], size).sum() == pytest.approx(math.pi * 60 * 30, rel=0.005)
    upright = drawn([ellipse(100, 100, 60, 30, math.pi / 2)], size)
    assert np.nonzero(upright.any(1))[0][[0, -1]].tolist() == [40, 159]
    assert turned(rectangle(0, 0, 4, 2), 0, 0, math.pi / 2) == pytest.approx([0, 0, 0, 4, -2, 4, -2, 0])  # clockwise
