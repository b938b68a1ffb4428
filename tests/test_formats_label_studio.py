"""Label Studio: shapes in percent, brushes in its own bit stream, names of uploads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.format_files import HEIGHT, WIDTH, box_mask, boxes, mask_of, save_images, write

from solov2.errors import InputError
from solov2.formats.label_studio import decode_brush
from solov2.formats.recognize import read, recognize

SIZE = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0, "from_name": "x", "to_name": "image"}
PERCENT = [[50, 25], [75, 25], [75, 50], [50, 50]]  # x 30 to 45, y 10 to 20
FOUND = ("car", 30, 10, 15, 10, 150)


def shape(kind: str, label: str = "car", **value: Any) -> dict[str, Any]:
    return {**SIZE, "id": f"{kind}{value}", "type": kind, "value": {**value, kind: [label]}}


def task(*result: Any, image: str = "/data/upload/1/3b2a1c4d-a.png", **more: Any) -> dict[str, Any]:
    return {"id": 7, "data": {"image": image}, "annotations": [{"id": 1, "result": list(result)}], **more}


POLYGON = shape("polygonlabels", points=PERCENT)


def encode_brush(mask: np.ndarray) -> list[int]:
    """As Label Studio's own encoder: literal and repeated blocks of the values of all RGBA pixels."""
    values = np.outer(mask.ravel(), (0, 0, 0, 255)).ravel()  # black; only alpha has the mask
    widths = (3, 4, 8, 16)
    bits = f"{len(values):032b}{7:05b}{''.join(f'{width - 1:04b}' for width in widths)}"
    runs = np.split(values, np.flatnonzero(np.diff(values)) + 1)
    for number, run in enumerate(runs):
        for start in range(0, len(run), 2**16):
            part = run[start : start + 2**16]
            choice = next(i for i, width in enumerate(widths) if len(part) <= 2**width)
            literal = number % 2 and len(part) < 40
            bits += f"{0 if literal else 1}{choice:02b}{len(part) - 1:0{widths[choice]}b}"
            bits += "".join(f"{value:08b}" for value in (part if literal else part[:1]))
    bits += "0" * (-len(bits) % 8)
    return [int(bits[place : place + 8], 2) for place in range(0, len(bits), 8)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_images(tmp_path, "images/a.png")
    return tmp_path


def test_shapes(folder: Path) -> None:
    brush = box_mask(3, 4, 20, 9) | box_mask(50, 30, 2, 2)
    separate = {**SIZE, "id": "s", "type": "polygon", "value": {"points": PERCENT}}
    result = [
        POLYGON,
        shape("rectanglelabels", "bus", x=50, y=50, width=25, height=25, rotation=0),
        shape("ellipselabels", "bus", x=50, y=50, radiusX=10, radiusY=25, rotation=0),
        shape("brushlabels", format="rle", rle=encode_brush(brush)),
        separate,
        {**SIZE, "id": "s", "type": "labels", "value": {"points": PERCENT, "labels": ["car", "bus"]}},
        shape("keypointlabels", x=1, y=1),
        {**separate, "id": "no label"},
        {"id": "c", "type": "choices", "value": {"choices": ["day"]}},
    ]
    path = write(folder / "project.json", [task(*result), task(image="b.png", annotations=[])])
    reading = read(path)
    assert recognize(folder) == "label-studio" and boxes(read(folder)) == boxes(reading)
    assert recognize(path) == "label-studio" and reading.class_names == ["bus", "car"]
    found = boxes(reading)["images/a.png"]
    assert found[2][:5] == ("bus", 24, 10, 12, 20)
    assert [*found[:2], found[4]] == [FOUND, ("bus", 30, 20, 15, 10, 150), FOUND]
    assert (mask_of(reading.images[0], reading.images[0].instances[3]) == brush).all()
    # the rectangle, the second label, the keypoint, the shape without label, the task without annotation
    assert sorted(reading.losses.counts.values()) == [1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "name", ["a.png", "/data/local-files/?d=images/a.png", "s3://bucket/x/a.png", "/data/upload/1/3b2a1c4d-a.png"]
)
def test_names_of_images(folder: Path, name: str) -> None:
    assert boxes(read(write(folder / "p.json", [task(POLYGON, image=name)]))) == {"images/a.png": [FOUND]}


def test_several_annotations_and_drafts(folder: Path) -> None:
    done = [{"was_cancelled": True, "result": []}, {"result": [POLYGON]}, {"result": []}]
    reading = read(write(folder / "p.json", [task(annotations=done)]))
    assert boxes(reading) == {"images/a.png": [FOUND]} and reading.losses.counts.total() == 1


@pytest.mark.parametrize("data", [None, "x", 10**13, [1, 2], [300], encode_brush(box_mask(0, 0, 9, 9))[:-9], [0] * 60])
def test_broken_brushes(data: Any) -> None:
    with pytest.raises(InputError, match="a.json: the brush"):
        decode_brush(data, (HEIGHT, WIDTH), "a.json")


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([task(shape("polygonlabels", points=[[1, "2"]]))], "task 7, entry 1"),
        ([task(shape("ellipselabels", x=1, y=1))], "entry 1 has no number `radiusX`"),
        ([task({**POLYGON, "image_rotation": 90})], "entry 1 was drawn on an image that was turned"),
        ([task({**POLYGON, "original_width": 61})], "61 x 40"),
        ([task("x")], "entry 1 of `result`"),
        ([task(POLYGON, data={"text": "hello"})], "names no image"),
        ([task(POLYGON), task(POLYGON)], "earlier task"),
        ([task(POLYGON, image="b.png")], "--images"),
    ],
)
def test_malformed(folder: Path, tasks: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        read(write(folder / "p.json", tasks))
    assert "p.json" in str(error.value)
