"""The generated dataset: what it promises, and that the seed determines everything."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from solov2.data import shapes as shapes_module
from solov2.data.coco import CocoInstances
from solov2.data.shapes import CLASSES, draw_scene, generate_shapes
from solov2.errors import InputError


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    assert generate_shapes(root, train_images=4, val_images=100, size=192, seed=0)
    return root


def masks_by_image(root):
    coco = COCO(root / "annotations" / "instances_val2017.json")
    for image_id in coco.imgs:
        entries = coco.imgToAnns[image_id]
        yield [(a, coco.annToMask(a).astype(bool)) for a in entries if not a["iscrowd"]], entries


def test_composition(shapes):
    """Four classes, 3 to 8 objects, 30 % overlapping, 25 % below 1/8 of the side, empty images, crowds."""
    counts, small, overlapping, classes, crowds, at_border, total = [], 0, 0, set(), 0, 0, 0
    for objects, entries in masks_by_image(shapes):
        counts.append(len(objects))
        crowds += len(entries) - len(objects)
        for annotation, mask in objects:
            classes.add(annotation["category_id"])
            total += 1
            small += annotation["area"] ** 0.5 < 192 / 8
            at_border += mask[[0, -1]].any() or mask[:, [0, -1]].any()
            # masks share no pixels, so overlapping shapes are those that touch
            grown = mask.copy()
            grown[1:] |= mask[:-1]
            grown[:-1] |= mask[1:]
            grown[:, 1:] |= mask[:, :-1]
            grown[:, :-1] |= mask[:, 1:]
            overlapping += any((grown & other).any() for _, other in objects if other is not mask)
    assert classes == set(CLASSES.values())
    assert counts.count(0) == 2 and all(3 <= count <= 8 for count in counts if count)
    assert crowds == 4
    assert small / total >= 0.25 and overlapping / total >= 0.30 and at_border / total >= 0.05


def test_all_three_kinds_of_segmentation_occur_and_agree_with_the_box(shapes):
    kinds = set()
    for objects, entries in masks_by_image(shapes):
        for annotation in entries:
            segmentation = annotation["segmentation"]
            kinds.add("polygon" if isinstance(segmentation, list) else type(segmentation["counts"]).__name__)
        for annotation, mask in objects:
            rows, columns = np.nonzero(mask)
            x, y, width, height = annotation["bbox"]
            assert abs(len(rows) - annotation["area"]) <= 1
            assert abs(x - columns.min()) <= 1 and abs(y - rows.min()) <= 1
            assert abs(x + width - columns.max() - 1) <= 1 and abs(y + height - rows.max() - 1) <= 1
    assert kinds == {"polygon", "str", "list"}


def test_objects_do_not_share_pixels(shapes):
    for objects, _ in masks_by_image(shapes):
        if objects:
            assert np.sum([mask for _, mask in objects], 0).max() <= 1


def test_the_seed_determines_everything(shapes, tmp_path):
    assert not generate_shapes(shapes, train_images=4, val_images=100, size=192, seed=0)  # already there
    again = tmp_path / "again"
    generate_shapes(again, train_images=4, val_images=1, size=192, seed=0)
    for path in again.rglob("train2017/*.jpg"):
        assert path.read_bytes() == (shapes / path.relative_to(again)).read_bytes()
    first, _ = draw_scene(np.random.default_rng([0, 0, 0]), 96, 0)
    other, _ = draw_scene(np.random.default_rng([1, 0, 0]), 96, 0)
    assert (first != other).any()


def test_it_loads_as_coco(shapes):
    dataset = CocoInstances(shapes / "annotations" / "instances_train2017.json", shapes / "train2017", training=True)
    assert dataset.class_names == list(CLASSES) and dataset.category_ids == [1, 3, 4, 7]
    sample = dataset[0]
    assert sample["image"].shape == (3, 192, 192) and sample["masks"].any(0).any()
    with Image.open(next((shapes / "train2017").iterdir())) as image:
        assert image.format == "JPEG"


def test_two_runs_that_start_together_share_it(tmp_path, monkeypatch):
    root, write = tmp_path / "shapes", shapes_module._write_split
    sizes = {"train_images": 4, "val_images": 2, "size": 64, "seed": 0}

    def write_after_the_other_run(*args):
        monkeypatch.setattr(shapes_module, "_write_split", write)
        assert root.exists() or generate_shapes(root, **sizes)  # the other run, from start to finish
        write(*args)

    monkeypatch.setattr(shapes_module, "_write_split", write_after_the_other_run)
    assert not generate_shapes(root, **sizes)
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


def test_other_data_is_never_overwritten(shapes, tmp_path):
    with pytest.raises(InputError, match="holds other data"):
        generate_shapes(shapes, train_images=5, val_images=100, size=192, seed=0)
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="holds other data"):
        generate_shapes(folder, train_images=1, val_images=1, size=64, seed=0)
    assert (folder / "mine.txt").read_text() == "keep"
    assert json.loads((shapes / "shapes.json").read_text())["seed"] == 0
