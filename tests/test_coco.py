"""COCO annotations: which become instances, how masks are read, and the messages for broken files."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from helpers import coco_files
from helpers.coco_files import HEIGHT, WIDTH, image_entry
from PIL import Image
from pycocotools.cocoeval import COCOeval

from solov2.data.coco import CocoInstances
from solov2.data.loader import Collate
from solov2.data.transforms import TrainTransform, TransformedDataset
from solov2.errors import InputError
from solov2.targets import TargetAssigner


def annotation(number: int, image: int = 1, category: int = 3, box: tuple = (10, 8, 20, 16), **changes) -> dict:
    return coco_files.annotation(number, image, category, box, **changes)


def rle(counts: list[int] | str, size: list[int] | None = None) -> dict:
    return {"size": size or [HEIGHT, WIDTH], "counts": counts}


class Tree:
    """A COCO tree on disk that a test can change before it opens it."""

    def __init__(self, folder: Path) -> None:
        self.file, self.images = folder / "instances.json", folder / "images"
        self.images.mkdir()
        for number in (1, 2, 3):
            self.save(f"{number}.png", WIDTH, HEIGHT, shade=number)
        self.content = {
            "images": [image_entry(number) for number in (1, 2, 3)],
            "annotations": [annotation(11), annotation(12, category=90, box=(0, 0, 8, 8)), annotation(21, image=2)],
            "categories": [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}],
        }

    def save(self, name: str, width: int, height: int, shade: int = 0, **options) -> None:
        Image.new("RGB", (width, height), (shade, 100, 200)).save(self.images / name, **options)

    def open(self, *, training: bool = True, **options) -> CocoInstances:
        self.file.write_text(json.dumps(self.content))
        return CocoInstances(self.file, self.images, training=training, **options)


@pytest.fixture
def tree(tmp_path) -> Tree:
    return Tree(tmp_path)


def test_sample(tree):
    dataset = tree.open()
    sample = dataset[0]
    assert sample["image"].shape == (3, HEIGHT, WIDTH) and sample["image"].dtype == torch.uint8
    assert sample["image"][:, 0, 0].tolist() == [1, 100, 200]
    assert sample["boxes"].dtype == torch.float32 and sample["boxes"].tolist() == [[10, 8, 30, 24], [0, 0, 8, 8]]
    assert sample["labels"].dtype == torch.int64 and sample["labels"].tolist() == [0, 1]
    assert sample["masks"].dtype == torch.uint8 and sample["masks"].shape == (2, HEIGHT, WIDTH)
    expected = torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8)
    expected[8:24, 10:30] = 1
    assert torch.equal(sample["masks"][0], expected)
    assert sample["image_id"] == 1 and sample["original_size"] == (HEIGHT, WIDTH)


def test_categories_are_in_order_of_id(tree):
    dataset = tree.open()
    assert dataset.class_names == ["car", "toothbrush"] and dataset.category_ids == [3, 90]


def test_images_without_instances_are_left_out(tree):
    dataset = tree.open()
    assert dataset.image_ids == [1, 2] and len(dataset) == 2
    assert dataset.aspect_ratios == [WIDTH / HEIGHT] * 2
    kept = tree.open(keep_empty=True)
    assert kept.image_ids == [1, 2, 3]
    empty = kept[2]
    assert empty["boxes"].shape == (0, 4) and empty["masks"].shape == (0, HEIGHT, WIDTH) and len(empty["labels"]) == 0


def test_small_images_are_left_out(tree):
    tree.content["images"][0]["height"] = 31
    assert tree.open().image_ids == [2]
    assert tree.open(min_size=31).image_ids == tree.open(min_size=0).image_ids == [1, 2]


@pytest.mark.parametrize(
    "changes",
    [
        {"iscrowd": 1},
        {"area": 0},
        {"area": -1.0},
        {"box": (10, 8, 0.9, 16)},
        {"box": (10, 8, 20, 0.5)},
        {"box": (WIDTH, 0, 10, 10)},
        {"box": (-10, 0, 10, 10)},
        {"box": (0, HEIGHT + 1, 10, 10)},
        {"box": (0, -30, 10, 30)},
    ],
    ids=str,
)
def test_annotations_that_are_not_instances(tree, changes):
    tree.content["annotations"].append(annotation(22, image=2, **{"area": 50, **changes}))
    tree.content["annotations"].append(annotation(31, image=3, **{"area": 50, **changes}))
    dataset = tree.open()
    assert dataset.image_ids == [1, 2]
    assert len(dataset[1]["labels"]) == 1


def test_box_at_the_border_is_not_clipped(tree):
    tree.content["annotations"] = [annotation(11, box=(-4, 40, 10, 20), area=5)]
    assert tree.open()[0]["boxes"].tolist() == [[-4, 40, 6, 60]]


def test_unknown_category_is_left_out_with_a_warning(tree, caplog):
    tree.content["annotations"].append(annotation(13, category=4))
    dataset = tree.open()
    assert re.search("1 of 4 annotations .*instances.json .*annotation 13 with category 4", caplog.text)
    assert len(dataset[0]["labels"]) == 2


def test_missing_iscrowd_means_0(tree):
    del tree.content["annotations"][0]["iscrowd"]
    assert len(tree.open()[0]["labels"]) == 2


def test_rle_segmentations(tree):
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[8:24, 10:30] = 1
    flat = mask.flatten(order="F")
    borders = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *borders, len(flat)]).tolist()
    tree.content["annotations"].append(annotation(13, segmentation=rle(counts)))
    compressed = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    tree.content["annotations"].append(annotation(14, segmentation=rle(compressed)))
    masks = tree.open()[0]["masks"]
    assert len(masks) == 4
    for index in (0, 2, 3):
        assert np.array_equal(masks[index].numpy(), mask)


def test_evaluation_gives_every_image_without_instances(tree):
    dataset = tree.open(training=False)
    assert dataset.image_ids == [1, 2, 3]
    sample = dataset[0]
    assert sample["image"].shape == (3, HEIGHT, WIDTH) and sample["original_size"] == (HEIGHT, WIDTH)
    assert sample["boxes"].shape == (0, 4) and sample["masks"].shape == (0, HEIGHT, WIDTH)
    assert sample["labels"].shape == (0,) and sample["labels"].dtype == torch.int64


def test_loading_prints_nothing(tree, capsys):
    dataset = tree.open(training=False)
    assert sorted(dataset.coco.getImgIds()) == [1, 2, 3]
    assert sorted(tree.open().coco.getAnnIds()) == [11, 12, 21]
    assert capsys.readouterr().out == ""


def test_pycocotools_can_evaluate_files_that_it_would_fail_on(tree):
    del tree.content["annotations"][0]["iscrowd"]
    tree.content["annotations"][1]["segmentation"].insert(0, [1, 2, 3, 4])  # pycocotools mistakes it for a box
    for training in (True, False):
        coco = tree.open(training=training).coco
        results = [{"image_id": 1, "category_id": 90, "score": 1.0, "segmentation": coco.annToRLE(coco.anns[12])}]
        evaluation = COCOeval(coco, coco.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        assert evaluation.eval["precision"].max() > 0.999  # the result is the annotation itself


def test_workers_do_not_receive_the_index(tree):
    dataset = tree.open(training=False)
    assert dataset.coco is dataset.coco
    assert pickle.loads(pickle.dumps(dataset))._coco is None
    other = pickle.loads(pickle.dumps(tree.open()))
    assert torch.equal(other[1]["masks"], tree.open()[1]["masks"])


def test_workers_share_the_annotations(tree):
    """The dataset is a fixed number of objects, however large the file: workers copy each object that they touch."""

    def containers(dataset: CocoInstances) -> int:
        found, waiting = set(), [dataset.__getstate__()]
        while waiting:
            entry = waiting.pop()
            if isinstance(entry, (dict, list, tuple)) and id(entry) not in found:
                found.add(id(entry))
                waiting += gc.get_referents(entry)
        return len(found)

    for training in (True, False):
        before = containers(tree.open(training=training))
        tree.content["images"] += [image_entry(number, "1.png") for number in range(100 + training, 140, 2)]
        tree.content["annotations"] += [annotation(1000 + k, image=100 + training) for k in range(training, 20, 2)]
        assert containers(tree.open(training=training)) == before


def test_indices(tree):
    dataset = tree.open()
    assert dataset[-1]["image_id"] == 2
    with pytest.raises(IndexError):
        dataset[2]
    assert [sample["image_id"] for sample in dataset] == [1, 2]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.pop("images"), "no list `images`"),
        (lambda c: c.pop("annotations"), "no list `annotations`"),
        (lambda c: c.update(categories={}), "no list `categories`"),
        (lambda c: c["images"].append(image_entry(2)), "image id 2 twice"),
        (lambda c: c["annotations"].append(annotation(11)), "annotation id 11 twice"),
        (lambda c: c["categories"].append({"id": 3, "name": "bus"}), "category id 3 twice"),
        (lambda c: c["categories"].append({"name": "bus"}), "category without an integer id"),
        (lambda c: c["annotations"].append(5), "annotation without an integer id"),
        (lambda c: c["categories"][0].pop("name"), "category 90 .* no name"),
        (lambda c: c["annotations"].append(annotation(13, image=99)), "annotation 13 .* image 99"),
        (lambda c: c["annotations"].append(annotation(13, image=[1])), r"annotation 13 .* image \[1\]"),
        (lambda c: c["annotations"][1].pop("category_id"), "annotation 12 .* no integer category_id"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, 3]), "annotation 12 .* no bbox"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, 3, float("nan")]), "annotation 12 .* no bbox"),
        (lambda c: c["annotations"][1].pop("area"), "annotation 12 .* no area"),
        (lambda c: c["images"][1].pop("file_name"), "image 2 .* no file_name"),
        (lambda c: c["images"][1].update(width=0), "image 2 .* no positive width and height"),
        (lambda c: c["images"][1].update(height="48"), "image 2 .* no positive width and height"),
        (lambda c: c["images"][1].update(file_name="../secret.png"), "image 2 .* outside the image folder"),
        (lambda c: c["images"][1].update(file_name="a/../../secret.png"), "image 2 .* outside the image folder"),
        (lambda c: c["images"][1].update(file_name="/etc/secret.png"), "image 2 .* outside the image folder"),
        (lambda c: c["annotations"][1].update(segmentation=[[1, 2, 3, 4]]), "annotation 12 .*three points"),
        (lambda c: c["annotations"][1].update(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "annotation 12 .* even "),
        (lambda c: c["annotations"][1].pop("segmentation"), "annotation 12 .*must be a list of polygons"),
        (lambda c: c["annotations"][1].update(segmentation=rle([5])), "annotation 12 .*add up"),
        (lambda c: c["annotations"][1].update(segmentation=rle([3072], [64, 48])), "annotation 12 .*size"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_broken_annotation_files(tree, change, reason, training):
    change(tree.content)
    with pytest.raises(InputError, match=reason) as error:
        tree.open(training=training)
    assert "instances.json" in str(error.value)


def test_broken_crowd_stops_evaluation_but_not_training(tree):
    tree.content["annotations"].append(annotation(13, iscrowd=1, segmentation=[]))
    assert len(tree.open()[0]["labels"]) == 2
    with pytest.raises(InputError, match="annotation 13"):
        tree.open(training=False)


def test_missing_paths(tree, tmp_path):
    tree.open()
    with pytest.raises(InputError, match="none.json does not exist"):
        CocoInstances(tmp_path / "none.json", tree.images, training=True)
    with pytest.raises(InputError, match="image folder .*none does not exist"):
        CocoInstances(tree.file, tmp_path / "none", training=True)


@pytest.mark.parametrize("content", [b"", b'{"images": [', b"\xff\xfe\xfa", b"[1, 2]"])
def test_not_json(tree, content):
    tree.file.write_bytes(content)
    with pytest.raises(InputError, match="annotation file .*instances.json (is not valid JSON|has no list)"):
        CocoInstances(tree.file, tree.images, training=True)


def test_no_usable_image(tree):
    crowds = copy.deepcopy(tree.content["annotations"])
    tree.content["annotations"] = [{**entry, "iscrowd": 1} for entry in crowds]
    with pytest.raises(InputError, match="instances.json has no usable image"):
        tree.open()
    tree.content.update(images=[], annotations=[])
    with pytest.raises(InputError, match="instances.json has no usable image"):
        tree.open(training=False)


def test_errors_name_unreadable_images(tree):
    dataset = tree.open()
    (tree.images / "2.png").unlink()
    with pytest.raises(InputError, match="2.png does not exist.*instances.json .*64 x 48"):
        dataset[1]
    tree.save("1.png", 50, 40)
    with pytest.raises(InputError, match="1.png is 50 x 40, but .*instances.json says 64 x 48$"):
        dataset[0]
    tree.save("1.png", WIDTH, HEIGHT)
    (tree.images / "1.png").write_bytes((tree.images / "1.png").read_bytes()[:60])
    with pytest.raises(InputError, match="1.png cannot be read.*64 x 48"):
        dataset[0]


def test_exif_rotation_is_not_applied(tree):
    exif = Image.Exif()
    exif[0x0112] = 6
    tree.save("1.png", WIDTH, HEIGHT, exif=exif)
    assert tree.open()[0]["image"].shape == (3, HEIGHT, WIDTH)
    tree.save("1.png", HEIGHT, WIDTH, exif=exif)
    with pytest.raises(InputError, match="EXIF rotation is not applied"):
        tree.open()[0]


def test_broken_images_can_be_skipped(tree, caplog):
    dataset = tree.open(training=False, skip_broken_images=True)
    (tree.images / "2.png").unlink()
    (tree.images / "3.png").write_bytes(b"")
    assert dataset[1]["image_id"] == 1  # 3 is broken too; then it starts over at 1
    assert [name in record.message for name, record in zip(("2.png", "3.png"), caplog.records, strict=True)] == [
        True
    ] * 2
    assert dataset[1]["image_id"] == dataset[2]["image_id"] == 1
    assert len(caplog.records) == 2  # one warning per file
    (tree.images / "1.png").unlink()
    with pytest.raises(InputError, match="no image of .* can be read"):
        dataset[0]
    assert "1.png" in caplog.records[2].message


def circle(number: int, side: int) -> dict:
    x, y = (37 * number) % (side - 40), (91 * number) % (side - 40)
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    outline = np.stack((x + 20 + 20 * np.cos(angles), y + 20 + 20 * np.sin(angles)), axis=1).ravel().tolist()
    return annotation(number, box=(x, y, 40, 40), segmentation=[outline])


def peak_of(task: Callable[[], object]) -> int:
    """Peak memory in bytes that Python and numpy have asked for, whether or not they wrote to it."""
    tracemalloc.start()
    try:
        task()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("decode_masks", [True, False])
def test_masks_are_not_made_before_the_size_is_known(tree, decode_masks):
    """The annotation file states 13,000 x 13,000 for a small image."""
    tree.content["images"][0].update(width=13_000, height=13_000)
    tree.content["annotations"] = [circle(number, 13_000) for number in range(1, 101)]
    dataset = tree.open(decode_masks=decode_masks)

    def load() -> None:
        with pytest.raises(InputError, match="1.png is 64 x 48, but .*instances.json says 13000 x 13000"):
            dataset[0]

    assert peak_of(load) < 10 * 2**20


def test_crowded_images_take_bounded_memory(tree):
    side, number = 2000, 300  # 1.2 GB of full-size masks
    tree.save("1.png", side, side)
    tree.content["images"][0].update(width=side, height=side)
    tree.content["annotations"] = [circle(k, side) for k in range(1, number + 1)]
    transform = TrainTransform(scales=[800], max_size=1333)
    samples = TransformedDataset(tree.open(decode_masks=False), transform, seed=0)
    assigner, batches = TargetAssigner((40, 12), [(1, 96), (48, 2048)], num_classes=2), []
    peak = peak_of(lambda: batches.append(Collate(assigner)([samples[0]])))
    targets = batches[0]["targets"]
    assert targets["masks"].shape == (number, 200, 200) and targets["masks"].flatten(1).any(1).all()
    assert peak < 150 * 2**20  # 64 MiB of masks at a time, the image, 12 MB of targets


def test_encoded_masks_are_the_same_masks(tree):
    tree.content["annotations"].append(annotation(13, segmentation=rle([48 * 10 + 5, 7, 48 * 54 - 12])))
    sample = tree.open(decode_masks=False)[0]
    ((masks, _),) = sample["masks"].chunks()
    assert torch.equal(masks, tree.open()[0]["masks"]) and masks.shape == sample["masks"].shape == (3, HEIGHT, WIDTH)


def test_subfolders_of_the_image_folder_are_allowed(tree):
    (tree.images / "sub").mkdir()
    tree.save("sub/1.png", WIDTH, HEIGHT)
    tree.content["images"][0]["file_name"] = "sub/../sub/1.png"
    assert tree.open()[0]["image_id"] == 1


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_photographs(coco_photos, split):
    file = coco_photos / "annotations" / f"instances_{split}.json"
    dataset = CocoInstances(file, coco_photos / split, training=True)
    usable = 0
    for index in range(0, len(dataset), 8):
        sample, coco = dataset[index], dataset.coco
        entries = [entry for entry in coco.imgToAnns[sample["image_id"]] if not entry["iscrowd"]]
        assert [dataset.category_ids[label] for label in sample["labels"]] == [e["category_id"] for e in entries]
        for mask, entry in zip(sample["masks"], entries):
            assert np.array_equal(mask.numpy(), coco.annToMask(entry)), entry["id"]
        usable += len(entries)
    assert usable > 20
    assert len(CocoInstances(file, coco_photos / split, training=False)) >= len(dataset)


def test_evaluation_checks_what_training_leaves_out(tree):
    """A segmentation that pycocotools cannot read is an error also where training does not look at it."""
    tree.content["annotations"][0] |= {"area": -1.0, "segmentation": [[1.0, 2.0, 3.0, [None], 5.0, 6.0, 7.0, 8.0]]}
    dataset = tree.open()
    with pytest.raises(InputError, match=r"annotation 11 of .*instances.json"):
        _ = dataset.coco
