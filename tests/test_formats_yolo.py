"""YOLO-segmentation: data.yaml in its forms, odd lines, and what is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.format_files import HEIGHT, WIDTH, box_mask, boxes, mask_of, rle, save_images, write

from solov2.errors import InputError
from solov2.formats import yolo
from solov2.formats.annotated import AnnotatedImage, AnnotatedInstance, Losses
from solov2.formats.recognize import read, recognize

LINE = "0 0.5 0.25 0.75 0.25 0.75 0.5 0.5 0.5"  # x 30 to 45, y 10 to 20
FOUND = ("car", 30, 10, 15, 10, 150)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two training images, one for validation."""
    save_images(tmp_path, "images/train/a.png", "images/train/b.png", "images/val/a.png")
    write(tmp_path / "labels/train/a.txt", f"{LINE}\n\n1 0 0 0.5 0 0.5 1 0 1\n")
    write(tmp_path / "labels/train/b.txt", "")
    write(tmp_path / "labels/val/a.txt", LINE)
    write(tmp_path / "data.yaml", "train: images/train\nval: images/val\nnc: 2\nnames: [car, bus]\n")
    return tmp_path


def test_a_dataset(folder: Path) -> None:
    reading = read(folder)
    assert recognize(folder) == recognize(folder / "data.yaml") == "yolo"
    assert reading.class_names == ["car", "bus"] and not reading.losses.counts
    assert boxes(reading) == {
        "images/train/a.png": [FOUND, ("bus", 0, 0, 30, 40, 1200)],
        "images/train/b.png": [],
        "images/val/a.png": [FOUND],
    }
    assert [image.split for image in reading.images] == ["train", "train", "val"]


@pytest.mark.parametrize(
    "table",
    [
        "names: {1: bus, 0: car}\ntrain: [images/train]\nval: ./images/val/",
        "names: [car, bus]\npath: ../datasets/mine\ntrain: ../images/train\nval: ../images/val",  # as Roboflow writes
        "names: [car, bus]\npath: /data/mine\ntrain: images/train\nval: images/val\ntest:",
        "names: [car, bus]\ntrain: train.txt\nval: lists/val.txt",
    ],
)
def test_forms_of_data_yaml(folder: Path, table: str) -> None:
    write(folder / "train.txt", "./images/train/a.png\n/somewhere/else/images/train/b.png\n")
    write(folder / "lists/val.txt", "images\\val\\a.png\n")
    write(folder / "data.yaml", table)
    reading = read(folder)
    assert [(image.file_name, image.split) for image in reading.images] == [
        ("images/train/a.png", "train"), ("images/train/b.png", "train"), ("images/val/a.png", "val")
    ]  # fmt: skip
    assert [len(image.instances) for image in reading.images] == [2, 0, 1]


def test_roboflows_folders_and_label_studios_class_list(folder: Path) -> None:
    for split in ("train", "val"):
        shutil.copytree(folder / "images" / split, folder / "r" / split / "images")
        shutil.copytree(folder / "labels" / split, folder / "r" / split / "labels")
    write(folder / "r/data.yaml", "names: [car, bus]\ntrain: ../train/images\nval: ../val/images")
    assert boxes(read(folder / "r"))["train/images/a.png"][0] == FOUND
    (folder / "data.yaml").unlink()
    write(folder / "classes.txt", "car\nbus\n")
    assert len(boxes(read(folder))) == 3
    (folder / "classes.txt").unlink()
    with pytest.raises(InputError, match="no data.yaml"):
        read(folder)


def test_odd_lines(folder: Path) -> None:
    lines = ["0 0.5 0.5 0.1 0.1", "1.0 0.5 0.5 0.1 0.1 0.9", f"{LINE} 0.87", "0 0.5 -0.01 1.02 -0.01 1.02 0.5 0.5 0.5"]
    write(folder / "labels/train/a.txt", "\r\n".join(lines))
    (folder / "labels/train/b.txt").unlink()
    reading = read(folder)
    assert boxes(reading)["images/train/a.png"] == [FOUND, ("car", 30, 0, 30, 20, 600)]
    assert {kind.split()[0]: number for kind, number in reading.losses.counts.items()} == {
        "boxes": 2, "confidences": 1, "polygons": 1, "images": 1
    }  # fmt: skip
    assert "labels/train/a.txt, line 1" in reading.losses.first.values()


MALFORMED = {
    "0 0.5 0.5 x 0.5": "line 1",
    "0 0.5 0.5": "line 1",
    "0 nan 0.25 0.75 0.25 0.75 0.5": "finite",
    "2 0.5 0.25 0.75 0.25 0.75 0.5": "class 2",
    "-1 0.5 0.25 0.75 0.25 0.75 0.5": "class -1",
    "0.5 0.5 0.25 0.75 0.25 0.75 0.5": "class 0.5",
    "0 30 10 45 10 45 20": "from 0 to 1",
}


@pytest.mark.parametrize("line", MALFORMED)
def test_malformed_lines(folder: Path, line: str) -> None:
    write(folder / "labels/train/a.txt", line)
    with pytest.raises(InputError, match=MALFORMED[line]) as error:
        read(folder)
    assert "labels/train/a.txt, line 1" in str(error.value)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("names: [car]\nnc: 2", "nc: 2"),
        ("names: [car, car]", "twice"),
        ("names: {0: car, 2: bus}", "from 0"),
        ("names: {car: 0}", "number"),
        ("names: car", "list of class names"),
        ("names: [car, bus]\nkpt_shape: [17, 3]", "keypoints"),
        ("names: [car, bus]\ntrain: nowhere", "train: nowhere"),
        ("names: [car, bus]\ntrain: 7", "`train`"),
        ("names: [car, bus]\ntrain: nowhere.txt", "nowhere.txt"),
        ("names: !!python/object:os.system {}", "YAML"),
    ],
)
def test_malformed_tables(folder: Path, table: str, words: str) -> None:
    write(folder / "data.yaml", table)
    with pytest.raises(InputError, match="data.yaml") as error:
        read(folder / "data.yaml")
    assert words in str(error.value)


def test_boxes_alone_are_refused(folder: Path) -> None:
    for path in (folder / "labels").rglob("*.txt"):
        write(path, "0 0.5 0.5 0.1 0.1")
    with pytest.raises(InputError, match="no mask.*3 boxes"):
        read(folder)


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    save_images(tmp_path / "pictures", "a.png", "sub/b.png")
    ring = box_mask(5, 5, 20, 20) & ~box_mask(10, 10, 5, 5)
    parts = [[1.53, 2.1, 10, 2, 10, 9.25], [40.1, 20.3, 50, 20, 50, 30]]
    instances = [
        AnnotatedInstance("b", parts),
        AnnotatedInstance("a", rle(ring)),
        AnnotatedInstance("a", rle(ring), True),
    ]
    images = [
        AnnotatedImage("a.png", HEIGHT, WIDTH, instances, "train"),
        AnnotatedImage("sub/b.png", HEIGHT, WIDTH, [], "val"),
    ]
    losses = yolo.write(images, ["a", "b"], tmp_path / "out")
    assert sorted(losses.counts.values()) == [1, 1, 1]  # parts joined, a hole, a crowd
    reading = read(tmp_path / "out", tmp_path / "pictures")
    assert [image.split for image in reading.images] == ["train", "val"] and reading.class_names == ["a", "b"]
    [first, second] = reading.images[0].instances
    assert (mask_of(reading.images[0], first) == mask_of(images[0], instances[0])).all() and first.class_name == "b"
    assert (mask_of(reading.images[0], second) == ring).all()


def test_supervision_agrees(tmp_path: Path) -> None:
    """It reads what is written; what it writes is read. OpenCV also fills the pixels of the border."""
    supervision = pytest.importorskip("supervision")
    save_images(tmp_path / "out/images", "a.png")
    masks = [box_mask(5, 5, 20, 20), box_mask(30, 10, 9, 21)]
    image = AnnotatedImage("a.png", HEIGHT, WIDTH, [AnnotatedInstance(n, rle(m)) for n, m in zip("ba", masks)])
    yolo.write([image], ["a", "b"], tmp_path / "out")
    places = (str(tmp_path / "out/images"), str(tmp_path / "out/labels"), str(tmp_path / "out/data.yaml"))
    found = supervision.DetectionDataset.from_yolo(*places)
    [(_, _, detections)] = list(found)
    assert found.classes == ["a", "b"] and detections.class_id.tolist() == [1, 0]
    assert all(not (mask & ~other).any() for mask, other in zip(masks, detections.mask))
    assert all(np.logical_and(*pair).sum() / np.logical_or(*pair).sum() > 0.85 for pair in zip(masks, detections.mask))
    again = tmp_path / "again"
    found.as_yolo(str(again / "images"), str(again / "labels"), str(again / "data.yaml"))
    reading = read(again)
    assert reading.class_names == ["a", "b"] and [x.class_name for x in reading.images[0].instances] == ["b", "a"]
    for instance, mask in zip(reading.images[0].instances, masks):
        other = mask_of(reading.images[0], instance)
        assert (mask & other).sum() / (mask | other).sum() > 0.85


def test_lines_of_a_class_out_of_the_table() -> None:
    with pytest.raises(ValueError):
        yolo.lines(AnnotatedImage("a.png", 4, 4, [AnnotatedInstance("x", [[0, 0, 1, 0, 1, 1]])]), ["a"], Losses())
