"""The examples that make data: pictures for docs/first_hour.md, and the coins of docs/gallery.md."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from solov2.data.generate import scene_generator
from solov2.data.shapes import CLASSES, draw_scene
from solov2.formats import labelme
from solov2.ops.masks import segmentation_to_mask


@pytest.fixture
def examples(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(repo_root / "examples")


def test_sample_photos_are_annotated_to_the_pixel(
    examples: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = tmp_path / "photos", tmp_path / "new"
    monkeypatch.setattr(sys, "argv", ["sample_photos.py", *map(str, folders), "--count", "3", "--size", "96"])
    importlib.import_module("sample_photos").main()
    assert len(list(folders[1].glob("*.jpg"))) == len(list(folders[1].iterdir())) == 20

    reading = labelme.read(folders[0], None)
    assert [image.file_name for image in reading.images] == ["IMG_0001.jpg", "IMG_0002.jpg", "IMG_0003.jpg"]
    names = {number: name for name, number in CLASSES.items()}
    for index, image in enumerate(reading.images):
        _, wanted = draw_scene(scene_generator(1, "train2017", index), 96, 0)
        assert len(image.instances) == len(wanted) >= 3
        for instance, entry in zip(image.instances, wanted):
            assert instance.class_name == names[entry["category_id"]] and not instance.is_crowd
            masks = [segmentation_to_mask(part, (96, 96)) for part in (instance.segmentation, entry["segmentation"])]
            assert torch.equal(*masks)


def test_coins_train_and_draw(examples: None, repo_root: Path, tmp_path: Path) -> None:
    """With light discs on a dark ground in place of the photograph, which is not in the repository."""
    coins = importlib.import_module("coins")
    shapes = json.loads((repo_root / "examples/coins.json").read_text())["shapes"]
    picture = Image.new("L", (384, 303), 40)
    for shape in shapes:
        ImageDraw.Draw(picture).polygon([tuple(point) for point in shape["points"]], fill=200)
    picture.save(tmp_path / "coins.png")
    pixels, masks = coins.read_coins(tmp_path / "coins.png")
    assert pixels.shape == (909, 1152, 3) and masks.shape == (24, 909, 1152)
    upper, lower = masks[:, : coins.BORDER].any((1, 2)), masks[:, coins.BORDER :].any((1, 2))
    assert upper.sum() == lower.sum() == 12 and not (upper & lower).any()
    assert pixels[masks.any(0) > 0].mean() > 195 and pixels[masks.any(0) == 0].mean() < 45  # the outlines fit

    crops = coins.Crops(pixels[: coins.BORDER], masks[upper, : coins.BORDER], 8)
    for index in range(8):
        image, target = crops[index]
        assert image.shape == (192, 192, 3) and (image == crops[index][0]).all()
        assert image[target["masks"].any(0)].mean() > 190 and len(target["labels"]) == len(target["masks"]) > 0

    found, truth = masks[:3] > 0, masks[[1, 3]] > 0
    assert coins.best_overlaps(found, truth).tolist() == [1, 0] and coins.best_overlaps(found[:0], truth).sum() == 0
    coins.main(tmp_path / "coins.png", tmp_path / "run", epochs=1, crops=8)
    assert Image.open(tmp_path / "run/coins.jpg").size == (1152, 909)
