"""Sizes and resizing against recorded results of mmdetection and OpenCV (tests/data/pipeline.*)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch

from solov2.ops.masks import masks_to_boxes
from solov2.ops.resize import (
    _opencv_resize,
    _resize_on_device,
    _resize_on_host,
    padded_size,
    quarter_masks,
    resize_extents,
    resize_image,
    resize_masks,
    resized_size,
)

DATA = Path(__file__).parent / "data"
OWN = (_resize_on_host, _resize_on_device)  # what resize_image does without OpenCV, and on an accelerator


@pytest.fixture(scope="module")
def reference() -> dict:
    return json.loads((DATA / "pipeline.json").read_text())


@pytest.fixture(scope="module")
def images() -> dict[str, torch.Tensor]:
    with np.load(DATA / "pipeline.npz") as arrays:
        return {name: torch.from_numpy(array).permute(2, 0, 1) for name, array in arrays.items()}


def random_masks(*shape: int) -> torch.Tensor:
    return torch.randint(0, 2, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_sizes_match_the_reference(reference):
    assert len(reference["sizes"]) == 72
    for (long, short), original, resized, padded in reference["sizes"]:
        size = resized_size(tuple(original), long=long, short=short)
        assert [*size] == resized, original
        assert [*padded_size(size)] == padded, original


def test_sizes_stay_positive_and_the_divisor_is_configurable():
    assert resized_size((1, 5000), long=1000, short=800) == (1, 1000)
    assert padded_size((64, 65)) == (64, 96)
    assert padded_size((1, 17), 8) == (8, 24)


@pytest.mark.parametrize("resize", OWN)
@pytest.mark.parametrize("name", ["up", "down", "slight", "none"])
def test_image_equals_opencv(images, name, resize):
    resized = resize(images["image"], tuple(images[name].shape[1:]))
    assert resized.dtype == torch.uint8 and torch.equal(resized, images[name])


def test_the_documented_lines_of_numpy_equal_opencv(images, repo_root):
    """docs/export.md shows how to resize where neither this library nor OpenCV is installed."""
    blocks = re.findall(r"```python\n(.*?)```", (repo_root / "docs/export.md").read_text(), flags=re.DOTALL)
    names: dict = {}
    exec(next(block for block in blocks if "def resize(" in block), names)
    for name in ("up", "down", "slight"):
        resized = names["resize"](images["image"].permute(1, 2, 0).numpy(), images[name].shape[1:])
        assert resized.dtype == np.uint8 and np.array_equal(resized, images[name].permute(1, 2, 0).numpy())


def random_sizes() -> list[tuple[int, ...]]:
    """(h, w, H, W) of 200 images: tiny ones, usual ones, and some that are reduced or enlarged a lot."""
    random = np.random.default_rng(0)
    limits = [((1, 9), (1, 9)), ((20, 300), (20, 300)), ((1, 40), (100, 700)), ((400, 900), (1, 90))]
    return [(*random.integers(*old, 2).tolist(), *random.integers(*new, 2).tolist()) for old, new in 50 * limits]


@pytest.mark.parametrize("resize", OWN)
def test_random_sizes_equal_opencv(resize):
    opencv = pytest.importorskip("cv2")
    for height, width, *size in random_sizes():
        image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = opencv.resize(image, size[::-1]).reshape(*size, 3)
        resized = resize(torch.from_numpy(image).permute(2, 0, 1), size)
        assert np.array_equal(resized.permute(1, 2, 0).numpy(), expected), (image.shape, size)


def test_both_own_forms_are_equal_at_random_sizes(monkeypatch):
    monkeypatch.setattr("solov2.ops.resize.DEVICE_VALUES", 1000)  # many bands
    for height, width, *size in random_sizes()[:60]:
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        assert torch.equal(_resize_on_host(image, size), _resize_on_device(image, size)), (image.shape, size)


@pytest.mark.parametrize("size", [(20, 31), (147, 200)])
@pytest.mark.parametrize("layout", [lambda x: x.contiguous(), lambda x: x.mT.contiguous().mT, lambda x: x.flip(2)])
def test_memory_layout_does_not_change_pixels(images, size, layout):
    interleaved, before = images["image"], images["image"].clone()
    assert not interleaved.is_contiguous()
    given = interleaved.flip(2) if layout(interleaved)[0, 0, 0] != interleaved[0, 0, 0] else interleaved
    for resize in (*OWN, resize_image):
        assert torch.equal(resize(layout(interleaved), size), resize(given, size))
    assert torch.equal(interleaved, before)


def test_an_opencv_with_other_values_is_not_used(monkeypatch, caplog, images):
    other = SimpleNamespace(
        resize=lambda image, size: np.zeros((size[1], size[0], 3), np.uint8),
        setNumThreads=lambda _count: None,
        __version__="9.9",
    )
    monkeypatch.setitem(sys.modules, "cv2", other)
    _opencv_resize.cache_clear()
    with caplog.at_level("WARNING", "solov2"):
        assert torch.equal(resize_image(images["image"], tuple(images["up"].shape[1:])), images["up"])
    assert "9.9" in caplog.text
    _opencv_resize.cache_clear()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_workers_resize_after_the_parent_has_used_opencv():
    """OpenCV's threads do not survive a fork; a worker must not wait for them."""
    pytest.importorskip("cv2")
    code = """
import torch
from torch.utils.data import DataLoader
from solov2.ops.resize import resize_image, _opencv_resize
torch.set_num_threads(2)
image = torch.zeros(3, 600, 800, dtype=torch.uint8)
class Images:
    def __len__(self): return 2
    def __getitem__(self, index): return resize_image(image, (900, 1200)).shape[1]
resize_image(image, (900, 1200))
for fresh in (False, True):
    if fresh: _opencv_resize.cache_clear()
    print([int(size) for size in DataLoader(Images(), num_workers=1, timeout=60)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n") == ["[900, 900]", "[900, 900]", ""], done.stderr


def test_nearest_neighbor_matches_opencv(reference):
    for case in reference["nearest"]:
        # A staircase of masks shows which source row each target row comes from.
        staircase = torch.eye(case["source"], dtype=torch.uint8)[:, :, None].expand(-1, -1, 2).contiguous()
        rows = resize_masks(staircase, (case["target"], 2))
        columns = resize_masks(staircase.mT.contiguous(), (2, case["target"]))
        for resized in (rows[:, :, 0], columns[:, 0, :]):
            assert resized.sum(0).tolist() == [1] * case["target"]
            assert resized.argmax(0).tolist() == case["index"]


@pytest.mark.parametrize("size", [(50, 67), (200, 131), (7, 5), (30, 40), (1, 1)])
def test_resized_masks_pick_the_expected_pixels(size):
    masks = random_masks(5, 30, 40)
    masks[1] = 0
    masks[2], masks[2, 11, 13] = 0, 1
    masks[3, :20] = 0
    masks[4, :, :9], masks[4, 22:] = 0, 0
    rows = (torch.arange(size[0]) * 30) // size[0]
    columns = (torch.arange(size[1]) * 40) // size[1]
    expected = masks[:, rows][:, :, columns]
    for given in (masks, masks.mT.contiguous().mT):  # row-major, and column-major as pycocotools decodes
        resized = resize_masks(given, size)
        assert resized.dtype == torch.uint8 and torch.equal(resized, expected)
        extents = masks_to_boxes(given).long()
        assert torch.equal(resize_masks(given, size, extents), expected)
        new_extents = resize_extents(extents, (30, 40), size)
        assert new_extents.dtype == torch.int64 and new_extents.shape == (5, 4)
        for mask, (x1, y1, x2, y2) in zip(expected, new_extents.tolist()):
            assert mask[y1:y2, x1:x2].sum() == mask.sum()


def test_no_masks():
    assert resize_masks(torch.zeros(0, 4, 4, dtype=torch.uint8), (8, 9)).shape == (0, 8, 9)
    assert quarter_masks(torch.zeros(0, 5, 8, dtype=torch.uint8)).shape == (0, 2, 2)


def test_quarter_masks_match_the_reference(reference):
    tested = 0
    for case in reference["mask_quarter"]:
        if case["shape"][0] % 4 or case["shape"][1] % 4:
            continue  # the reference pads before resizing, but the recorded call did not
        mask = coco_mask.decode({"size": case["shape"], "counts": case["mask"].encode()})
        expected = coco_mask.decode({"size": case["out_shape"], "counts": case["out"].encode()})
        assert np.array_equal(quarter_masks(torch.from_numpy(mask)[None])[0].numpy(), expected), case["name"]
        tested += 1
    assert tested == 2


@pytest.mark.parametrize("height", [8, 9, 10, 11, 2, 1])
@pytest.mark.parametrize("width", [12, 13, 14, 15])
def test_quarter_masks_of_any_size_are_zero_padded(height, width):
    masks = random_masks(3, height, width)
    padded = torch.zeros(3, -(-height // 4) * 4, -(-width // 4) * 4, dtype=torch.uint8)
    padded[:, :height, :width] = masks
    expected = [
        [
            [padded[n, y + 1 : y + 3, x + 1 : x + 3].sum() >= 2 for x in range(0, padded.shape[2], 4)]
            for y in range(0, padded.shape[1], 4)
        ]
        for n in range(3)
    ]
    before = masks.clone()
    assert quarter_masks(masks).tolist() == torch.tensor(expected).int().tolist()
    assert torch.equal(masks, before)
    masks[:, : height // 3] = 0
    masks[:, :, 9:] = 0
    roomy = (-(-height // 4) + 2, -(-width // 4) + 1)
    for size in (None, roomy):
        quarters = quarter_masks(masks, size, masks_to_boxes(masks).long())
        everywhere = quarter_masks(masks)
        assert torch.equal(quarters[:, : everywhere.shape[1], : everywhere.shape[2]], everywhere)
        assert size is None or quarters.shape == (3, *roomy) and quarters.sum() == everywhere.sum()
