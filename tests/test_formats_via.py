"""VGG Image Annotator: projects and exports, shapes, and the attribute that names the class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.format_files import boxes, save_images, write

from solov2.errors import InputError
from solov2.formats.recognize import read, recognize

POLYGON = {"name": "polygon", "all_points_x": [10, 30, 30, 10], "all_points_y": [8, 8, 24, 24]}
FOUND = ("car", 10, 8, 20, 16, 320)


def region(shape: dict[str, Any] = POLYGON, **attributes: Any) -> dict[str, Any]:
    return {"shape_attributes": shape, "region_attributes": attributes}


def entries(*regions: Any, name: str = "a.png") -> dict[str, Any]:
    return {f"{name}123": {"filename": name, "size": 123, "regions": list(regions), "file_attributes": {}}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_images(tmp_path, "a.png")
    return tmp_path


def test_a_project_and_an_export(folder: Path) -> None:
    regions = [
        region(kind="car"),
        region({"name": "rect", "x": 40, "y": 20, "width": 10, "height": 10}, kind={"bus": True, "car": False}),
        region({"name": "circle", "cx": 20, "cy": 20, "r": 10}, kind="disc"),
        region({"name": "ellipse", "cx": 20, "cy": 20, "rx": 10, "ry": 5, "theta": 1.5707963267948966}, kind="disc"),
        region({"name": "point", "cx": 1, "cy": 1}, kind="car"),
        region(kind=""),
    ]
    project = {"_via_settings": {}, "_via_img_metadata": entries(*regions), "_via_attributes": {}}
    first = entries(*regions)
    first["a.png123"]["regions"] = dict(enumerate(regions))  # VIA 1
    for content in (project, entries(*regions), first):
        path = write(folder / "via.json", content)
        reading = read(path)
        assert recognize(path) == "via" and reading.class_names == ["bus", "car", "disc"]
        found = boxes(reading)["a.png"]
        assert found[:2] == [FOUND, ("bus", 40, 20, 10, 10, 100)]
        assert [x[:5] for x in found[2:]] == [("disc", 10, 10, 20, 20), ("disc", 15, 10, 10, 20)]
        assert sorted(reading.losses.counts.values()) == [1, 1, 1]  # the rectangle, the point, no class


def test_a_folder_has_one_file(folder: Path) -> None:
    write(folder / "one.json", entries(region()))
    assert recognize(folder) == "via" and boxes(read(folder))["a.png"][0][1:] == FOUND[1:]
    write(folder / "two.json", entries(region()))
    with pytest.raises(InputError, match=r"one\.json, two\.json"):
        read(folder)


def test_the_attribute_of_the_class(folder: Path) -> None:
    path = write(folder / "via.json", entries(region(id=1, Class="car"), region(id=2, Class="bus")))
    assert read(path).class_names == ["bus", "car"]
    reading = read(write(path, entries(region())))
    assert reading.class_names == ["object"] and reading.losses.counts.total() == 1
    with pytest.raises(InputError, match="via.json have the attributes id, color"):
        read(write(path, entries(region(id=1, color="red"))))
    with pytest.raises(InputError, match="region 1 has several classes: a, b"):
        read(write(path, entries(region(kind={"a": True, "b": True}))))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (entries(region({**POLYGON, "all_points_x": [1]}, c="a")), "region 1: all_points_x"),
        (entries(region({"name": "rect", "x": 1}, c="a")), "region 1 has no number `y`"),
        (entries(region({"name": "circle", "cx": 1, "cy": 2, "r": float("nan")}, c="a")), "region 1 has no number `r`"),
        (entries({"shape_attributes": POLYGON}), "region 1: region_attributes"),
        (entries("x"), "entry 1 of `regions`"),
        (entries(region(c="a"), name="b.png"), "b.png.*--images"),
        ({"_via_img_metadata": []}, "must be an object"),
        ({**entries(region(c="a")), "again": entries(region(c="a"))["a.png123"]}, "earlier entry"),
    ],
)
def test_malformed(folder: Path, content: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        read(write(folder / "via.json", content))
    assert "via.json" in str(error.value)
