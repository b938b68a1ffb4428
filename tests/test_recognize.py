"""Files and folders of other tools are named for what they are."""

from __future__ import annotations

import bz2
import gzip
import json
import zipfile
from pathlib import Path

import pytest
from helpers.coco_files import CocoTree

from solov2.commands.check_data import main as check_main
from solov2.commands.train import main as train_main
from solov2.data.annotations import load_json
from solov2.data.recognize import describe_folder
from solov2.errors import InputError

COCO = {"images": [], "annotations": [], "categories": []}
PANOPTIC = {"image_id": 1, "file_name": "1.png", "segments_info": [{"id": 1, "category_id": 1}]}
FILES: dict[str, tuple[object, str]] = {
    "gzip": (gzip.compress(b"{}"), "gzip"),
    "bzip2": (bz2.compress(b"{}"), "bzip2"),
    "Pascal VOC": (b"\n<annotation></annotation>", "Pascal VOC"),
    "labelme": ({"version": "5", "shapes": [], "imagePath": "1.jpg"}, "labelme"),
    "VIA": ({"_via_settings": {}, "_via_img_metadata": {}}, "VGG Image Annotator"),
    "GeoJSON": ({"type": "FeatureCollection", "features": []}, "GeoJSON"),
    "results": ([{"image_id": 1, "category_id": 1, "score": 0.5}], "results"),
    "panoptic": ({**COCO, "annotations": [PANOPTIC]}, "panoptic"),
    "captions": ({"images": [], "annotations": [{"id": 1, "image_id": 1, "caption": "a cat"}]}, "captions"),
    "annotations by id": ({**COCO, "annotations": {"1": {}}}, "object as `annotations`"),
    "images of a test set": ({"images": [], "categories": []}, "no list `annotations`"),
    "null": (None, "no list `images`"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_other_formats(tmp_path: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    content, word = FILES[name]
    path = tmp_path / "instances.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert check_main([str(path), "--images", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert word in error and str(path) in error and error.count("\n") == 1


def test_a_zip_archive_and_a_folder(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.json", "w") as archive:
        archive.writestr("a", "{}")
    with pytest.raises(InputError, match="ZIP"):
        load_json(tmp_path / "a.json")
    with pytest.raises(InputError, match="is a folder"):
        load_json(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_every_unicode_encoding_is_read(tmp_path: Path, encoding: str) -> None:
    content = {**COCO, "info": {"NaN": float("nan"), "Infinity": float("inf")}, "categories": [{"id": 1, "name": "狗"}]}
    (tmp_path / "a.json").write_text(json.dumps(content, ensure_ascii=False), encoding=encoding)
    assert load_json(tmp_path / "a.json")["categories"] == content["categories"]


@pytest.mark.parametrize("segmentation", [[], None, "missing"])
def test_a_file_of_boxes(tree: CocoTree, capsys: pytest.CaptureFixture, segmentation: object) -> None:
    """Detection and keypoint files have boxes, but no masks to learn."""
    for entry in tree.content["annotations"]:
        entry.update(segmentation=segmentation, keypoints=[1, 2, 2], num_keypoints=1)
        if segmentation == "missing":
            del entry["segmentation"]
    tree.file.write_text(json.dumps(tree.content))
    words = ["--train-annotations", str(tree.file), "--train-images", str(tree.images), "--evaluate-every", "0"]
    assert train_main([*words, "--output", str(tree.file.parent / "run")]) == 2
    assert f"{tree.file} has boxes or keypoints but no masks" in capsys.readouterr().err
    assert check_main([str(tree.file), "--images", str(tree.images), "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert "error: no masks (1)\n" in out and "error: segmentation (6, --fix removes them)" in out


@pytest.fixture
def tree(tmp_path: Path) -> CocoTree:
    return CocoTree(tmp_path)


FOLDERS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "labelme": ({"a/1.jpg": "", "a/1.json": '{"shapes": [], "imagePath": "1.jpg"}'}, ("labelme", "1.json")),
    "YOLO": ({"data.yaml": "", "images/train/1.jpg": "", "labels/train/1.txt": "0 0.5 0.5 1 1"}, ("YOLO", "1.txt")),
    "VOC": ({"JPEGImages/1.jpg": "", "Annotations/1.xml": "<annotation/>"}, ("Pascal VOC", "1.xml")),
    "Roboflow": (
        {"train/_annotations.coco.json": json.dumps(COCO), "valid/_annotations.coco.json": '{"images":['},
        ("train/_annotations.coco.json, valid/_annotations.coco.json", "--train-annotations", "--val-images"),
    ),
    "archives": ({"train2017.zip": ""}, ("train2017.zip", "unpack")),
    "images": ({"1.jpg": ""}, ("images but no annotation",)),
    "something else": ({"thesis.tex": ""}, ("no annotation file",)),
    "empty": ({}, ("is empty",)),
}  # fmt: skip


FOUND = ("labelme", "YOLO", "Roboflow")


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_other_formats(tmp_path: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    files, words = FOLDERS[name]
    root = tmp_path / "data"
    root.mkdir()
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    assert train_main(["--data", str(root), "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    start = f"error: no data: {root}/annotations/instances_train2017.json does not exist; {root} "
    if name in FOUND:  # read by training, and refused for what is wrong in them
        assert not error.startswith(start) and str(root) in error
        error += describe_folder(root)
    else:
        assert error.startswith(start)
    assert all(word in error for word in words), error
    assert (
        not (tmp_path / "run.data").exists()
        and error.count("\n") == 1
        and "cocodataset.org" not in error
        and not (tmp_path / "run").exists()
    )


def test_the_parent_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train2017").mkdir()
    assert f"--data {tmp_path}?" in describe_folder(tmp_path / "train2017")
    assert f"--data {tmp_path}?" in describe_folder(tmp_path / "annotations")
