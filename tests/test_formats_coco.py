"""COCO-like exports: Roboflow's folders, CVAT's and Label Studio's paths, missing fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.format_files import HEIGHT, WIDTH, boxes, save_images, write

from solov2.errors import InputError
from solov2.formats.annotated import to_coco
from solov2.formats.recognize import read, recognize

SQUARE = [10, 8, 30, 8, 30, 24, 10, 24]
FOUND = ("car", 10, 8, 20, 16, 320)


def content(name: str = "a.png", **changes: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 1, "file_name": name}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": [SQUARE]}],
        "categories": [{"id": 0, "name": "objects", "supercategory": "none"}, {"id": 1, "name": "car"}],
        **changes,
    }


def test_missing_fields_are_computed(tmp_path: Path) -> None:
    save_images(tmp_path, "a.png")
    path = write(tmp_path / "result.json", content())
    reading = read(path)
    found = to_coco(reading)
    assert recognize(path) == "coco" and found["categories"] == [{"id": 1, "name": "car"}]
    assert found["images"] == [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}]
    [annotation] = found["annotations"]
    assert (annotation["area"], annotation["bbox"], annotation["iscrowd"]) == (320, [10, 8, 20, 16], 0)
    assert list(reading.losses.counts.values()) == [1]  # the category 0


def test_roboflow(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        save_images(tmp_path / split, "a.png")
        write(tmp_path / split / "_annotations.coco.json", content())
    reading = read(tmp_path)
    assert boxes(reading) == {"train/a.png": [FOUND], "valid/a.png": [FOUND]} and reading.class_names == ["car"]
    assert [image.split for image in reading.images] == ["train", "val"]


def test_cvats_folders(tmp_path: Path) -> None:
    save_images(tmp_path / "images/default", "a.png")
    path = write(tmp_path / "annotations/instances_default.json", content())
    assert boxes(read(tmp_path)) == boxes(read(path)) == {"images/default/a.png": [FOUND]}


@pytest.mark.parametrize(
    "name",
    ["/home/me/images/a.png", "..\\..\\images\\a.png", "https://x.org/images/a.png?size=2", "images/a.png", "../a.png"],
)
def test_names_of_other_machines(tmp_path: Path, name: str) -> None:
    save_images(tmp_path / "images", "a.png")
    assert list(boxes(read(write(tmp_path / "result.json", content(name))))) == ["images/a.png"]


def test_odd_notations(tmp_path: Path) -> None:
    save_images(tmp_path, "a.png")
    annotations = [
        {"image_id": "1", "category_id": "0", "segmentation": SQUARE, "iscrowd": True},
        {"image_id": 1.0, "category_id": 1, "segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, 40, 2360]}},
        {"image_id": 1, "category_id": 1, "segmentation": [SQUARE, [1, 2, 3, 4]]},
        {"image_id": 1, "category_id": 1, "segmentation": [], "bbox": [1, 2, 3, 4]},
    ]
    reading = read(write(tmp_path / "result.json", content(annotations=annotations)))
    assert boxes(reading)["a.png"] == [("objects", *FOUND[1:]), ("car", 0, 0, 1, 40, 40), FOUND]
    assert [x.is_crowd for x in reading.images[0].instances] == [True, False, False]
    assert reading.class_names == ["objects", "car"] and sorted(reading.losses.counts.values()) == [1, 1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"annotations": [{"id": 7, "image_id": 2, "category_id": 1, "segmentation": [SQUARE]}]},
            "annotation 7.*image 2",
        ),
        ({"annotations": [{"id": 7, "image_id": 1, "category_id": 5}]}, "annotation 7.*category 5"),
        ({"annotations": [{"id": 7, "image_id": 1}]}, "annotation 7.*`category_id`"),
        ({"annotations": [{"id": 7, "image_id": 1, "category_id": 1, "segmentation": [["x"] * 6]}]}, "annotation 7"),
        ({"annotations": [{"id": 7, "image_id": 1, "category_id": 1, "segmentation": {"counts": 1}}]}, "annotation 7"),
        ({"annotations": [{"id": 7, "image_id": 1, "category_id": 1, "segmentation": [SQUARE, 1]}]}, "annotation 7"),
        ({"annotations": [{"id": 7, "image_id": 1, "category_id": 1, "segmentation": [{}]}]}, "annotation 7"),
        ({"annotations": [1]}, "entry 1 of `annotations`"),
        ({"categories": []}, "annotation 1.*category 1"),
        ({"categories": [{"id": 1}]}, "category 1 has no text `name`"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "category 2.*twice"),
        ({"images": [{"id": 1}]}, "image 1 has no text `file_name`"),
        ({"images": [{"id": 1, "file_name": "a.png"}] * 2}, "image 2.*twice"),
        ({"images": [{"id": 1, "file_name": "a.png", "height": 1, "width": 1}]}, "60 x 40"),
        ({"images": [{"id": 1, "file_name": "b.png"}]}, "--images"),
        ({"annotations": []}, "no mask"),
    ],
)
def test_malformed(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    save_images(tmp_path, "a.png")
    with pytest.raises(InputError, match=words) as error:
        read(write(tmp_path / "result.json", content(**changes)))
    assert "result.json" in str(error.value) and "\n" not in str(error.value)


def test_supervision_reads_what_is_written(tmp_path: Path) -> None:
    supervision = pytest.importorskip("supervision")
    save_images(tmp_path, "a.png")
    written = write(tmp_path / "out/written.json", to_coco(read(write(tmp_path / "result.json", content()))))
    found = supervision.DetectionDataset.from_coco(str(tmp_path), str(written), force_masks=True)
    [(_, _, detections)] = list(found)
    assert found.classes == ["car"] and detections.xyxy.tolist() == [[10, 8, 30, 24]]
