"""Panoptic samples, their transforms and their targets: mmdetection's pipeline, and what each rule leaves out."""

from __future__ import annotations

import gzip
import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import shared_folder
from helpers.panoptic_files import HEIGHT, WIDTH, PanopticTree, paint, segment
from PIL import Image

from solov2.data.coco import CocoInstances
from solov2.data.loader import Collate
from solov2.data.panoptic import CocoPanoptic
from solov2.data.transforms import (
    TrainTransform,
    TransformedDataset,
    flip_sample,
    resize_sample,
    transpose_sample,
)
from solov2.errors import InputError
from solov2.ops.mask_map import MaskMap
from solov2.ops.masks import encode_rle
from solov2.ops.panoptic import replace_ids, rgb_from_ids
from solov2.ops.resize import resize_masks
from solov2.targets import TargetAssigner, semantic_target

DATA = Path(__file__).parent / "data" / "panoptic"


@pytest.fixture
def tree(tmp_path: Path) -> PanopticTree:
    return PanopticTree(tmp_path)


def opened(tree: PanopticTree, **settings: Any) -> CocoPanoptic:
    return CocoPanoptic(tree.write(), tree.images, **{"training": True, **settings})


def assigner(classes: int) -> TargetAssigner:
    return TargetAssigner((40, 24, 12), [(1, 96), (48, 192), (96, 2048)], num_classes=classes)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[CocoPanoptic, list[dict], dict[str, np.ndarray]]:
    """The six pictures of the reference as a dataset, its cases, and its maps."""
    root = tmp_path_factory.mktemp("targets")
    cases = json.loads(gzip.decompress((DATA / "targets.json.gz").read_bytes()))
    maps = dict(np.load(DATA / "targets.npz"))
    (root / "images").mkdir()
    (root / "png").mkdir()
    for name in [name for name in maps if name.startswith("png/")]:
        Image.fromarray(rgb_from_ids(maps[name])).save(root / name)
    for image in cases["annotations"]["images"]:
        pixels = np.zeros((image["height"], image["width"], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / image["file_name"])
    (root / "panoptic.json").write_text(json.dumps(cases["annotations"]))
    dataset = CocoPanoptic(
        root / "panoptic.json", root / "images", segments=root / "png", training=True, decode_masks=False
    )
    return dataset, cases["cases"], maps


@pytest.mark.parametrize("number", range(6))
def test_targets_of_the_reference(recorded: tuple, number: int) -> None:
    dataset, cases, maps = recorded
    case = cases[number]
    assert (len(dataset.class_names), len(dataset.stuff_names)) == (80, 53)
    sample = dataset[dataset.image_ids.index(case["image_id"])]
    assert sample["original_size"] == tuple(case["original_size"])
    sample = flip_sample(resize_sample(sample, tuple(case["size"])), horizontal=case["flip"], vertical=False)
    ((masks, _),) = sample["masks"].chunks()
    assert [rle["counts"] for rle in encode_rle(masks)] == case["masks"]
    assert sample["labels"].tolist() == case["labels"]
    assert np.abs(sample["boxes"].numpy() - np.array(case["boxes"]).reshape(-1, 4)).max(initial=0) < 1e-4
    assert np.array_equal(sample["semantic"], maps[f"semantic_{number}"])
    batch = Collate(assigner(80))([sample])
    assert batch["pixels"].shape[2:] == tuple(case["padded"])
    target = batch["targets"]["semantic"]
    assert target.dtype == torch.uint8 and np.array_equal(target[0], maps[f"target_centre_{number}"])


def test_semantic_target() -> None:
    labels = torch.arange(15 * 10, dtype=torch.uint8).reshape(15, 10)
    target = semantic_target(labels, (32, 32))
    assert target.shape == (8, 8) and target.dtype == torch.uint8
    for y in range(8):
        for x in range(8):
            inside = 4 * y + 2 < 15 and 4 * x + 2 < 10
            assert target[y, x] == (labels[4 * y + 2, 4 * x + 2] if inside else 255)


def test_a_sample(tree: PanopticTree) -> None:
    dataset = opened(tree)
    assert (dataset.class_names, dataset.category_ids) == (["car", "bus"], [4, 9])
    assert (dataset.stuff_names, dataset.stuff_category_ids) == (["road", "grass", "sky"], [2, 11, 20])
    assert dataset.image_ids == [1, 2, 3] and dataset.aspect_ratios == [WIDTH / HEIGHT] * 3
    assert dataset.file_name(2) == "2.jpg" and dataset.image_sizes().tolist() == [[HEIGHT, WIDTH]] * 3
    sample, ids = dataset[0], paint(tree.infos())
    assert sample["boxes"].tolist() == [[4, 4, 24, 16]] and sample["labels"].tolist() == [0]  # no crowd
    assert sample["boxes"].dtype == torch.float32 and sample["masks"].dtype == sample["semantic"].dtype == torch.uint8
    assert np.array_equal(sample["masks"][0], ids == 70001)
    expected = np.select([ids == 70001, ids == 300, ids == 2**24 - 1, ids == 7], [3, 3, 0, 2], 255)
    assert np.array_equal(sample["semantic"], expected)
    grass = dataset[1]
    assert grass["masks"].shape == (0, HEIGHT, WIDTH) and grass["boxes"].shape == (0, 4) and len(grass["labels"]) == 0
    positions, labels, boxes = dataset.instance_table()
    assert positions.tolist() == [0, 2] and labels.tolist() == [0, 1] and boxes[1].tolist() == [10, 10, 40, 40]
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[0]["semantic"], sample["semantic"])


def test_which_images_train(tree: PanopticTree, caplog: pytest.LogCaptureFixture) -> None:
    tree.content["annotations"][1]["segments_info"] = []
    del tree.content["annotations"][2]
    assert opened(tree).image_ids == [1]
    assert "1 image" in caplog.text and "image 3" in caplog.text
    assert opened(tree, keep_empty=True).image_ids == opened(tree, training=False).image_ids == [1, 2]
    with pytest.raises(InputError, match="49 pixels"):
        opened(tree, min_size=49)


def test_evaluation_reads_no_png(tree: PanopticTree) -> None:
    for png in tree.segments.iterdir():
        png.unlink()
    sample = opened(tree, training=False)[0]
    assert sample["masks"].shape == (0, HEIGHT, WIDTH) and "semantic" not in sample
    with pytest.raises(InputError, match=r"1.png does not exist .*image 1 in .*panoptic.json"):
        opened(tree)[0]


def test_which_segments_are_instances(tree: PanopticTree, caplog: pytest.LogCaptureFixture) -> None:
    infos = tree.infos(2)
    infos[:] = [
        segment(1, 9, (0, 0, 9, 9)), segment(2, 9, (20, 0, 9, 9), area=0),
        segment(3, 4, (30, 0, 9, 9), bbox=[30, 0, 0.5, 9]),
        segment(4, 4, (40, 0, 9, 9), iscrowd=1), segment(5, 9, (50, 0, 9, 9)), segment(6, 20, (0, 20, 9, 9)),
    ]  # fmt: skip
    ids = paint([infos[0], *infos[3:]])
    ids[40:] = 77  # an id that the JSON lacks; 5 gets no pixel
    ids[ids == 5] = 0
    tree.save("3.png", ids)
    sample = opened(tree)[2]
    assert sample["labels"].tolist() == [1, 1] and sample["masks"].flatten(1).sum(1).tolist() == [81, 0]
    assert "2 things" in caplog.text and "segment 2 of image 3" in caplog.text
    assert sample["semantic"].unique().tolist() == [2, 3, 255] and (sample["semantic"][40:] == 255).all()
    crowds = opened(tree, crowd="instance")[2]
    assert crowds["labels"].tolist() == [1, 0, 1]


def test_classes_of_both_kinds_are_needed(tree: PanopticTree) -> None:
    for category in tree.content["categories"]:
        category["isthing"] = 1
    with pytest.raises(InputError, match="stuff"):
        opened(tree)
    for category in tree.content["categories"]:
        category["isthing"] = 0
    with pytest.raises(InputError, match="things"):
        opened(tree)


def test_broken_pngs_and_images_can_be_skipped(tree: PanopticTree, caplog: pytest.LogCaptureFixture) -> None:
    (tree.segments / "1.png").write_bytes(b"")
    (tree.images / "2.jpg").unlink()
    with pytest.raises(InputError, match="1.png"):
        opened(tree)[0]
    assert opened(tree, skip_broken_images=True)[0]["image_id"] == 3
    assert "1.png" in caplog.text and "2.jpg" in caplog.text
    Image.new("RGB", (HEIGHT, WIDTH)).save(tree.images / "3.jpg")
    with pytest.raises(InputError, match=f"{HEIGHT} x {WIDTH}.*EXIF"):
        opened(tree)[2]


def test_the_map_transforms_as_each_mask_does() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        ids = rng.choice([0, 3, 500, 70000], rng.integers(2, 40, 2)).astype(np.int32)
        keys = np.array([500, 3, 9, 70000])
        planes = torch.from_numpy((ids == keys[:, None, None]).astype(np.uint8))
        semantic = torch.from_numpy(replace_ids(ids, {3: 1, 500: 0}, other=255, dtype=np.uint8))
        common = {
            "image": torch.zeros(3, *ids.shape, dtype=torch.uint8), "boxes": torch.zeros(4, 4),
            "labels": torch.zeros(4).long(), "original_size": ids.shape, "semantic": semantic,
        }  # fmt: skip
        size, dims = tuple(rng.integers(2, 50, 2).tolist()), rng.random(3) < 0.5

        def transformed(masks: Any) -> dict[str, Any]:
            sample = resize_sample({**common, "masks": masks}, size)  # noqa: B023, called in the loop
            sample = flip_sample(sample, horizontal=dims[0], vertical=dims[1])  # noqa: B023
            return transpose_sample(sample) if dims[2] else sample  # noqa: B023

        expected, found = transformed(planes), transformed(MaskMap(keys, ids))
        drawn = list(found["masks"].chunks(max_bytes=2 * found["masks"].values.size))
        assert [len(masks) for masks, _ in drawn] == [2, 2]
        assert torch.equal(torch.cat([masks for masks, _ in drawn]), expected["masks"])
        assert found["masks"].shape == expected["masks"].shape
        for mask, (x1, y1, x2, y2) in zip(expected["masks"], torch.cat([extents for _, extents in drawn]).tolist()):
            assert mask.sum() == mask[y1:y2, x1:x2].sum() and (mask.any() or x2 == 0)
        keep = torch.tensor([True, False, False, True])
        assert torch.equal(next(found["masks"][keep].chunks())[0], expected["masks"][keep])
        assert torch.equal(found["semantic"], expected["semantic"])
        car = (semantic == 1).to(torch.uint8)[None]
        again = transformed(car)
        assert torch.equal(again["masks"][0], (found["semantic"] == 1).to(torch.uint8))
        assert torch.equal(resize_masks(car, size)[0], resize_sample({**common, "masks": car}, size)["masks"][0])


def test_batches_of_both_kinds_of_masks_are_equal(tree: PanopticTree) -> None:
    transform = TrainTransform(scales=[64, 96], max_size=128, dihedral=True)
    batches = []
    for decode_masks in (True, False):
        samples = TransformedDataset(opened(tree, decode_masks=decode_masks), transform, seed=3)
        batches.append(Collate(assigner(2))([samples[index] for index in (0, 1, 2)]))
    first, second = (batch["targets"] for batch in batches)
    assert first.keys() == second.keys() and first["semantic"].shape == (3, *first["masks"].shape[1:])
    for key, value in first.items():
        assert torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key]
    assert first["instances_per_image"] == [1, 0, 1] and set(first["semantic"].unique().tolist()) == {0, 1, 2, 3, 255}


def test_instance_batches_have_no_semantic_target(tree: PanopticTree) -> None:
    targets = assigner(2)(
        [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "masks": torch.zeros(0, 64, 64)}], (64, 64)
    )
    assert "semantic" not in targets


def test_crowded_images_take_bounded_memory(tree: PanopticTree) -> None:
    side, number = 2000, 300  # 1.2 GB of full-size masks
    infos = [segment(k, 9, (100 * (k % 20), 100 * (k // 20), 90, 90)) for k in range(1, number + 1)]
    tree.infos(2)[:] = infos
    tree.content["images"][2].update(width=side, height=side)
    tree.save("3.png", paint(infos, (side, side)))
    Image.new("RGB", (side, side)).save(tree.images / "3.jpg")
    transform = TrainTransform(scales=[800], max_size=1333)
    samples = TransformedDataset(opened(tree, decode_masks=False), transform, seed=0)
    tracemalloc.start()
    targets = Collate(assigner(2))([samples[2]])["targets"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert targets["masks"].shape == (number, 200, 200) and targets["masks"].flatten(1).any(1).all()
    assert peak < 150 * 2**20  # 64 MiB of masks at a time, the image, the map, 12 MB of targets


def test_photographs_have_the_instances_of_their_instances_file() -> None:
    root = shared_folder("coco_panoptic_photos")
    panoptic = CocoPanoptic(root / "annotations" / "panoptic_val2017.json", root / "val2017", training=True)
    instances = CocoInstances(
        root / "annotations" / "instances_val2017.json", root / "val2017", training=True, keep_empty=True
    )
    assert len(panoptic) == 30 and panoptic.class_names == instances.class_names
    for index in range(0, 30, 4):
        sample = panoptic[index]
        other = instances[instances.image_ids.index(sample["image_id"])]
        order, other_order = ([*range(len(s["labels"]))] for s in (sample, other))
        order.sort(key=lambda i: sample["boxes"][i].tolist())  # noqa: B023, called in the loop
        other_order.sort(key=lambda i: other["boxes"][i].tolist())  # noqa: B023
        for key in ("boxes", "labels", "masks"):
            assert torch.equal(sample[key][order], other[key][other_order])
        assert (sample["semantic"][sample["masks"].bool().any(0)] == 53).all()
