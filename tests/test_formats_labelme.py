"""labelme: shapes, groups, masks and odd members are read; what is written comes back."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.format_files import HEIGHT, WIDTH, box_mask, boxes, mask_of, rle, save_images, write
from PIL import Image

from solov2.errors import InputError
from solov2.formats import labelme
from solov2.formats.annotated import AnnotatedImage, AnnotatedInstance
from solov2.formats.recognize import read, recognize

SQUARE = [[10, 8], [30, 8], [30, 24], [10, 24]]


def shape(label: str = "car", points: Any = SQUARE, kind: str | None = "polygon", **more: Any) -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}, **more}


def document(*shapes: Any, name: str = "a.png", **more: Any) -> dict[str, Any]:
    size = {"imageHeight": HEIGHT, "imageWidth": WIDTH}
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": list(shapes),
        "imagePath": name,
        "imageData": None,
        **size,
        **more,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_images(tmp_path, "a.png", "sub/b.png")
    return tmp_path


def test_shapes_and_groups(folder: Path) -> None:
    shapes = [
        shape(),
        shape("bus", [[50, 30], [40, 20]], "rectangle"),
        shape("disc", [[20, 20], [20, 30]], "circle"),
        shape("car", kind=None),  # of old versions
        shape("car", [[0, 0], [4, 0], [4, 4], [0, 4]], group_id=1),
        shape("car", [[50, 0], [54, 0], [54, 4], [50, 4]], group_id=1),
        shape("bus", [[50, 0], [54, 0], [54, 4], [50, 4]], group_id=1),  # another class is another instance
        shape("car", [[1, 1], [5, 5]], "line"),
        shape("__ignore__"),
        shape("car", [[1, 1], [5, 5]]),
    ]
    write(folder / "a.json", document(*shapes))
    write(folder / "sub/b.json", document(name="b.png"))
    reading = read(folder)
    found = boxes(reading)
    assert recognize(folder) == "labelme" and reading.class_names == ["bus", "car", "disc"]
    disc = found["a.png"].pop(2)
    assert disc[:5] == ("disc", 10, 10, 20, 20) and disc[5] == pytest.approx(314, abs=6)
    assert found["a.png"] == [
        ("car", 10, 8, 20, 16, 320), ("bus", 40, 20, 10, 10, 100), ("car", 10, 8, 20, 16, 320),
        ("car", 0, 0, 54, 4, 32), ("bus", 50, 0, 4, 4, 16),
    ]  # fmt: skip
    assert found["sub/b.png"] == []
    assert sorted(reading.losses.counts.values()) == [1, 1, 1, 1] and "a.json, shape 8" in str(reading.losses.first)


def test_a_mask_and_a_crowd(folder: Path) -> None:
    window = np.array([[1, 0], [1, 1]], dtype=bool)
    file = io.BytesIO()
    Image.fromarray(window).save(file, format="PNG")
    data = base64.b64encode(file.getvalue()).decode()
    mask = shape("a", [[3, 5], [4, 6]], "mask", mask=data)
    beyond = shape("a", [[WIDTH - 1, HEIGHT - 1], [WIDTH, HEIGHT]], "mask", mask=data)
    write(folder / "a.json", document(mask, beyond, shape("b", flags={"iscrowd": True})))
    reading = read(folder / "a.json")
    [first, second, crowd] = reading.images[0].instances
    found = mask_of(reading.images[0], first)
    assert found.sum() == 3 and found[5, 3] and found[6, 3] and found[6, 4]
    assert mask_of(reading.images[0], second).sum() == 1 and crowd.is_crowd and not first.is_crowd


@pytest.mark.parametrize("name", ["a.png", "..\\pictures\\a.png", "C:\\data\\a.png", "/home/me/a.png", "../../a.png"])
def test_the_written_name_is_inside_the_folder(tmp_path: Path, name: str) -> None:
    save_images(tmp_path / "pictures", "a.png")
    write(tmp_path / "labels/a.json", document(shape(), name=name))
    assert list(boxes(read(tmp_path / "labels", tmp_path / "pictures"))) == ["a.png"]


def test_an_image_outside_is_not_opened(tmp_path: Path) -> None:
    save_images(tmp_path / "pictures", "a.png")
    write(tmp_path / "labels/a.json", document(shape(), name="../pictures/a.png"))
    with pytest.raises(InputError, match="a.json.*outside.*--images"):
        read(tmp_path / "labels")


def test_missing_images(folder: Path) -> None:
    write(folder / "a.json", document(shape()))
    write(folder / "c.json", document(shape(), name="c.png", imageData="aaaa"))
    reading = read(folder)
    assert list(boxes(reading)) == ["a.png"] and "imageData" in str(reading.losses.first)
    (folder / "a.png").unlink()
    with pytest.raises(InputError, match="not one of the annotated images.*--images"):
        read(folder)


MALFORMED: dict[str, tuple[Any, str]] = {
    "no points": (document(shape(points=None)), "a.json, shape 1"),
    "triples": (document(shape(points=[[1, 2, 3]])), "a.json, shape 1"),
    "infinite": (document(shape(points=[[1, float("inf")], [2, 3], [4, 5]])), "a.json, shape 1"),
    "far outside": (document(shape(points=[[1, 1e9], [2, 3], [4, 5]])), "a.json, shape 1"),
    "text": (document(shape(points=[["1", "2"]] * 3)), "a.json, shape 1"),
    "one corner": (document(shape(points=[[1, 2]], kind="rectangle")), "two points"),
    "no label": (document(shape(label="")), "label"),
    "no object": (document("car"), "entry 1 of `shapes`"),
    "another size": (document(shape(), imageWidth=WIDTH + 1), "61 x 40"),
    "no image": (document(shape(), name=""), "imagePath"),
    "a broken mask": (document(shape(points=[[0, 0], [1, 1]], kind="mask", mask="!")), "base64"),
    "no mask": (document(), "has no mask"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(folder: Path, name: str) -> None:
    content, words = MALFORMED[name]
    write(folder / "a.json", content)
    with pytest.raises(InputError) as error:
        read(folder)
    assert words in str(error.value) and "a.json" in str(error.value) or name == "no mask"
    assert "\n" not in str(error.value)


def test_two_files_of_one_image(folder: Path) -> None:
    for name in ("a.json", "b.json"):
        write(folder / name, document(shape()))
    with pytest.raises(InputError, match="same image"):
        read(folder)


def test_what_is_written_comes_back(folder: Path, tmp_path: Path) -> None:
    ring = box_mask(5, 5, 20, 20) & ~box_mask(10, 10, 5, 5)
    parts = [[1.5, 2, 10, 2, 10, 9.25], [40, 20, 50, 20, 50, 30]]
    images = [
        AnnotatedImage("sub/b.png", HEIGHT, WIDTH, [
            AnnotatedInstance("a", parts), AnnotatedInstance("b", rle(ring)), AnnotatedInstance("a", rle(ring), True)
        ]),
        AnnotatedImage("a.png", HEIGHT, WIDTH),
    ]  # fmt: skip
    losses = labelme.write(images, folder, tmp_path / "out")
    assert losses.counts.total() == 3
    reading = read(tmp_path / "out", folder)
    by_name = {image.file_name: image for image in reading.images}
    assert by_name["a.png"].instances == []
    [first, second, third] = by_name["sub/b.png"].instances
    assert first.segmentation == parts and third.is_crowd
    assert (mask_of(by_name["sub/b.png"], second) == ring).all()
    with pytest.raises(InputError, match="already exists"):
        labelme.write(images, folder, tmp_path / "out")


def test_supervision_reads_what_is_written(folder: Path, tmp_path: Path) -> None:
    supervision = pytest.importorskip("supervision")
    instances = [AnnotatedInstance("a", [[0, 0, 9, 0, 9, 9, 0, 9], [20, 0, 29, 0, 29, 9, 20, 9]])]
    instances.append(AnnotatedInstance("b", [[40, 20, 49, 20, 49, 29, 40, 29]]))
    labelme.write([AnnotatedImage("a.png", HEIGHT, WIDTH, instances)], folder, tmp_path / "out")
    found = supervision.DetectionDataset.from_labelme(str(folder), str(tmp_path / "out"))
    [(_, _, detections)] = list(found)
    assert found.classes == ["a", "b"] and detections.class_id.tolist() == [0, 1]
    assert detections.xyxy.round().tolist() == [[0, 0, 29, 9], [40, 20, 49, 29]]
