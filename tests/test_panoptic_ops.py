"""Panoptic maps: ids and colors, areas and boxes of segments, pixels of pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from solov2.ops.panoptic import (
    count_pairs,
    ids_from_rgb,
    measure_segments,
    replace_ids,
    rgb_from_ids,
    swap_red_and_blue,
)


def random_map(rng: np.random.Generator, ids: list[int], size: tuple[int, int] = (13, 9)) -> np.ndarray:
    """A map in which runs of equal ids also end at the border and go on in the next row."""
    return np.repeat(rng.choice(ids, size[0] * size[1]), rng.integers(1, 5, size[0] * size[1]))[
        : size[0] * size[1]
    ].reshape(size)


def test_ids_and_colors() -> None:
    ids = np.array([[0, 1, 255], [256, 65536, 2**24 - 1]])
    colors = rgb_from_ids(ids)
    assert colors.tolist() == [[[0, 0, 0], [1, 0, 0], [255, 0, 0]], [[0, 1, 0], [0, 0, 1], [255, 255, 255]]]
    assert colors.dtype == np.uint8 and ids_from_rgb(colors).dtype == np.int32
    for dtype in (np.int32, np.int64, np.uint32, ">i4"):
        assert (ids_from_rgb(rgb_from_ids(ids.astype(dtype))) == ids).all()
    assert (ids_from_rgb(rgb_from_ids(ids.T)) == ids.T).all() and (ids_from_rgb(colors[:, ::-1]) == ids[:, ::-1]).all()
    tensor = torch.from_numpy(ids).int()
    assert isinstance(rgb_from_ids(tensor), torch.Tensor) and torch.equal(ids_from_rgb(rgb_from_ids(tensor)), tensor)
    assert rgb_from_ids(ids[:0]).shape == (0, 3, 3) and ids_from_rgb(colors[:, :0]).shape == (2, 0)
    flat = rgb_from_ids(ids)[..., ::-1]
    assert (swap_red_and_blue(ids) == ids_from_rgb(flat)).all()


@pytest.mark.parametrize("wrong", [-1, 2**24])
def test_ids_beyond_three_bytes_have_no_color(wrong: int) -> None:
    with pytest.raises(ValueError, match=str(wrong)):
        rgb_from_ids(np.array([[3, wrong]]))


def test_areas_and_boxes() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = random_map(rng, [0, 7, 300, 2**24 - 1, 70000])
        table = measure_segments(ids)
        assert table.ids.tolist() == sorted(set(ids.ravel().tolist()) - {0})
        for number, area, box in zip(*(column.tolist() for column in table)):
            rows, columns = np.nonzero(ids == number)
            assert area == len(rows) and box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    empty = measure_segments(np.zeros((3, 4), np.int32))
    assert [len(column) for column in empty] == [0, 0, 0] and empty.boxes.shape == (0, 4)


def test_pairs() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        first, second = (random_map(rng, ids) for ids in ([0, 5, 2**24 - 1], [0, 5, 66000, 2**24 - 1]))
        pairs = count_pairs(first, second.astype(np.int32))
        assert list(pairs) == sorted(set(zip(first.ravel().tolist(), second.ravel().tolist())))
        assert all(((first == a) & (second == b)).sum() == number for (a, b), number in pairs.items())


def test_replaced_ids() -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        ids = random_map(rng, [0, 5, 66000, 2**24 - 1])
        replaced = replace_ids(ids, {5: 3, 2**24 - 1: 0, 8: 1}, other=255, dtype=np.uint8)
        assert replaced.dtype == np.uint8 and np.array_equal(
            replaced, np.select([ids == 5, ids == 2**24 - 1], [3, 0], 255)
        )
