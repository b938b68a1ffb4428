"""`solov2.train(data=dataset)`: a user's own dataset of (image, instances)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.tiny_runs import SETTINGS
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset

import solov2
from solov2.config import load_config
from solov2.data.coco import CocoInstances
from solov2.data.shapes import generate_shapes
from solov2.errors import InputError
from solov2.formats import torch_dataset
from solov2.training.job import prepare_job

TINY = load_config("quickstart", SETTINGS)


class Shapes(Dataset):
    """A split of generated shapes as users write it: PIL images, masks and labels as tensors or arrays."""

    def __init__(self, root: Path, split: str, *, arrays: bool = False) -> None:
        self.root, self.arrays, self.asked = root / split, arrays, Counter[int]()
        self.coco = CocoInstances(
            root / f"annotations/instances_{split}.json", self.root, training=True, keep_empty=True
        )
        self.classes = self.coco.class_names

    def __len__(self) -> int:
        return len(self.coco)

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        self.asked[index] += 1
        sample = self.coco[index]
        masks, labels = sample["masks"].bool(), sample["labels"]
        image = Image.fromarray(sample["image"].permute(1, 2, 0).numpy())
        if self.arrays:
            return np.asarray(image), {"masks": masks.numpy(), "labels": labels.tolist(), "boxes": sample["boxes"]}
        return image, {"masks": masks, "labels": labels, "image_id": index}


class Made(Dataset):
    """One item, given."""

    def __init__(self, item: Any, names: Any = ("cat", "dog")) -> None:
        self.item, self.class_names = item, names

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return self.item


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    generate_shapes(root, train_images=12, val_images=4, size=64, seed=0)
    return root


def test_trains_as_the_files_do_and_resumes(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same last weights to the bit from files, from datasets, and from datasets after an interruption."""
    data = {"train": Shapes(shapes, "train2017"), "val": Shapes(shapes, "val2017", arrays=True)}
    settings: dict[str, Any] = {"device": "cpu", "epochs": 2, "workers": 0}
    files = {
        f"{split}_{kind}": shapes
        / (f"annotations/instances_{split}2017.json" if kind == "annotations" else f"{split}2017")
        for split in ("train", "val")
        for kind in ("annotations", "images")
    }
    wanted = solov2.train(TINY, data=files, output=tmp_path / "files", shapes=False, **settings)
    found = solov2.train(TINY, data=data, output=tmp_path / "own", **settings)
    assert found.metrics == wanted.metrics and (tmp_path / "own" / "predictions.png").is_file()
    states = [solov2.weights.read_checkpoint(result.last).weights for result in (wanted, found)]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    with pytest.raises(solov2.training.signals.Stopped):
        stop = {"callbacks": [lambda row: row.get("step") == 4]}
        solov2.train(TINY, data=data, output=tmp_path / "cut", **settings, **stop)
    written = (tmp_path / "cut.data" / "train.json").read_bytes()
    asked = data["train"].asked.copy()
    resumed = solov2.train(data=data, output=tmp_path / "cut", resume=True, device="cpu")
    assert (tmp_path / "cut.data" / "train.json").read_bytes() == written
    assert (data["train"].asked - asked).total() < 2 * 12  # not read again before training
    again = solov2.weights.read_checkpoint(resumed.last).weights
    assert all(torch.equal(states[0][name], value) for name, value in again.items())


def test_annotations_are_those_of_the_items(shapes: Path, tmp_path: Path) -> None:
    """Equal masks, classes and sizes; every item is asked for once; the file has the names of the dataset's classes."""
    dataset = Shapes(shapes, "train2017")
    job = prepare_job(TINY, data=dataset, output=tmp_path / "run", overrides={"workers": 0})
    assert set(dataset.asked.values()) == {1} and len(dataset.asked) == 12
    contents = {name: json.loads(text) for name, text in job.files.items()}
    assert contents.keys() == {"train.json", "val.json"}
    assert job.config.data.shapes is False and job.config.data.train_annotations == str(
        tmp_path / "run.data/train.json"
    )
    assert len(contents["train.json"]["images"]) == 9 and len(contents["val.json"]["images"]) == 3
    (tmp_path / "run.data").mkdir()
    for name, content in contents.items():
        (tmp_path / "run.data" / name).write_text(json.dumps(content))
        own = CocoInstances(
            tmp_path / "run.data" / name, tmp_path / "run.data", training=True, keep_empty=True, source=dataset
        )
        assert own.class_names == dataset.classes and own.files() == []
        for position in range(len(own)):
            index = int(own.record(position).file_name)
            wanted, sample = dataset.coco[index], own[position]
            assert torch.equal(own.image(position), wanted["image"])
            for key in ("image", "labels", "masks"):
                assert torch.equal(sample[key], wanted[key]), (index, key)


def test_settings_are_proposed_for_a_dataset(shapes: Path, tmp_path: Path) -> None:
    name, dataset = "solov2_light_r18_fpn_3x", Shapes(shapes, "train2017")
    job = prepare_job(name, data=dataset, output=tmp_path / "run", propose=True, overrides={"workers": 0})
    proposed = yaml.safe_load(job.files["proposal.yaml"])
    assert proposed["base"] == name and proposed["train"]["epochs"] == job.config.train.epochs != 36
    assert job.sources == {"train": dataset, "val": dataset}


def test_classes_of_a_subset_and_crowds(shapes: Path, tmp_path: Path) -> None:
    subset = Subset(Shapes(shapes, "train2017"), [3, 5])
    reading = torch_dataset.read(subset, tmp_path, split="val", workers=1)
    assert reading.class_names == subset.dataset.classes and [x.file_name for x in reading.images] == ["0", "1"]
    assert {image.split for image in reading.images} == {"val"}
    masks = torch.zeros(2, 8, 9, dtype=torch.uint8)
    masks[:, 2:4, 3:6] = 255
    image = torch.zeros(3, 8, 9, dtype=torch.uint8)
    item = image, {"masks": masks, "labels": torch.tensor([1, 0]), "iscrowd": torch.tensor([0, 1])}
    (first, _) = torch_dataset.read(Made(item), tmp_path).images
    assert [(x.class_name, x.is_crowd) for x in first.instances] == [("dog", False), ("cat", True)]
    nothing = torch_dataset.read(Made((image, {"masks": masks[:0], "labels": []})), tmp_path)
    assert (nothing.images[1].instances, nothing.images[1].width) == ([], 9)


IMAGE = torch.zeros(3, 8, 9, dtype=torch.uint8)
MASKS = torch.ones(1, 8, 9)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (IMAGE, "item 0 .*image, instances"),
        ((IMAGE, [1]), "item 0 .*masks and labels, not list"),
        ((IMAGE, {"boxes": 1}), "item 0 .*masks and labels.*boxes"),
        ((IMAGE, {"masks": MASKS[:, :4], "labels": [0]}), r"item 0 .*\[1, 8, 9\]"),
        ((IMAGE, {"masks": MASKS, "labels": [0, 1]}), r"item 0 .*\[2, 8, 9\]"),
        ((IMAGE, {"masks": MASKS, "labels": [2]}), r"item 0 .*label 2 .*0\.\.1"),
        ((IMAGE.long(), {"masks": MASKS, "labels": [0]}), "item 0 .*uint8"),
        ((None, {"masks": MASKS, "labels": [0]}), "item 0 .*an image must be"),
    ],
)
def test_malformed_items_are_named(item: Any, words: str, tmp_path: Path) -> None:
    for workers in (0, 1):
        with pytest.raises(InputError, match=words):
            torch_dataset.read(Made(item), tmp_path, workers=workers)


def test_unusable_datasets_are_refused_before_anything_is_written(shapes: Path, tmp_path: Path) -> None:
    dataset = Shapes(shapes, "train2017")

    class Stream(IterableDataset):
        class_names = ["cat"]

        def __iter__(self) -> Iterator[Any]:
            return iter(())

    cases: list[tuple[Any, str, dict[str, Any]]] = [
        (Made((IMAGE, {})[0], names=None), "class_names", {}),
        (Stream(), "__len__", {}),
        ({"train": dataset}, "no 'val'", {}),
        ({"val": dataset}, "not val", {}),
        ({"train": dataset, "val": "folder"}, "not train, val", {}),
        (dataset, "panoptic", {"num_stuff": 3}),
    ]
    for data, words, overrides in cases:
        with pytest.raises(InputError, match=words):
            solov2.train(TINY, data=data, output=tmp_path / "run", device="cpu", **overrides)
    assert list(tmp_path.iterdir()) == []
    job = prepare_job(TINY, data={"train": dataset}, output=tmp_path / "run", overrides={"evaluate_every": 0})
    assert job.files.keys() == {"train.json"}


def test_items_that_changed_are_named(shapes: Path, tmp_path: Path) -> None:
    dataset = Shapes(shapes, "train2017")
    job = prepare_job(TINY, data=dataset, output=tmp_path / "run")
    path = tmp_path / "train.json"
    path.write_text(job.files["train.json"])
    for source, words in (
        (Made((IMAGE, {})), "item .* is 9 x 8, but was 64 x 64"),
        (Subset(dataset, []), "does not exist"),
    ):
        own = CocoInstances(path, tmp_path, training=True, source=source)
        with pytest.raises(InputError, match=words):
            own[0]
