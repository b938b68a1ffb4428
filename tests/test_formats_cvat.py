"""CVAT for images: its shapes, groups and masks; no entity is expanded."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.format_files import HEIGHT, WIDTH, boxes, mask_of, save_images, write

from solov2.errors import InputError
from solov2.formats.recognize import read, recognize

META = (
    "<meta><task><labels><label><name>car</name></label><label><name>bus</name></label>"
    "<label><name>unused</name></label></labels></task></meta>"
)
POLYGON = '<polygon label="car" points="10,8;30,8;30,24;10,24" z_order="0"/>'


def document(*shapes: str, name: str = "a.png", width: int = WIDTH, before: str = "") -> str:
    image = f'<image id="0" name="{name}" width="{width}" height="{HEIGHT}">{"".join(shapes)}</image>'
    head = '<?xml version="1.0" encoding="utf-8"?>\n'
    return f"{head}{before}<annotations><version>1.1</version>{META}{image}</annotations>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_images(tmp_path, "images/a.png")
    return tmp_path


def test_shapes(folder: Path) -> None:
    shapes = [
        POLYGON,
        '<box label="bus" xtl="40" ytl="20" xbr="50" ybr="30"/>',
        '<ellipse label="bus" cx="20" cy="20" rx="10" ry="5" rotation="90"/>',
        '<mask label="car" rle="1, 2, 1, 2" left="3" top="5" width="3" height="2"/>',
        '<polygon label="car" points="0,0;4,0;4,4;0,4" group_id="3"/>',
        '<polygon label="car" points="50,0;54,0;54,4;50,4" group_id="3"/>',
        '<polyline label="car" points="1,1;2,2"/>',
        "<tag label='car'/>",
    ]
    path = write(folder / "annotations.xml", document(*shapes))
    reading = read(folder)
    assert recognize(path) == recognize(folder) == "cvat" and reading.class_names == ["car", "bus", "unused"]
    found = boxes(reading)["images/a.png"]
    assert found[2][:5] == ("bus", 15, 10, 10, 20)
    assert [*found[:2], *found[3:]] == [
        ("car", 10, 8, 20, 16, 320), ("bus", 40, 20, 10, 10, 100), ("car", 4, 5, 2, 2, 4), ("car", 0, 0, 54, 4, 32)
    ]  # fmt: skip
    mask = mask_of(reading.images[0], reading.images[0].instances[3])
    assert mask[5, 4] and mask[5, 5] and mask[6, 4] and mask[6, 5]
    assert sorted(reading.losses.counts.values()) == [1, 1, 1]  # the rectangle, the line, the tag


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_no_entity_is_expanded(folder: Path, encoding: str) -> None:
    bomb = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>'
    text = document(POLYGON.replace("car", "&b;"), before=bomb).replace("utf-8", encoding)
    (folder / "annotations.xml").write_bytes(text.encode(encoding))
    with pytest.raises(InputError, match="annotations.xml has a document type"):
        read(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (document('<polygon label="car" points="1,2;x,4;5,6"/>'), "shape 1.*'x'"),
        (document('<polygon label="car" points="1,2;3;5,6"/>'), "shape 1"),
        (document('<polygon points="1,2;3,4;5,6"/>'), "shape 1 has no label"),
        (document('<box label="car" xtl="1" ytl="nan" xbr="3" ybr="4"/>'), "shape 1: ytl"),
        (document('<mask label="car" rle="1, 9" left="3" top="5" width="3" height="2"/>'), "shape 1: the runs"),
        (document('<mask label="car" rle="6" left="59" top="5" width="3" height="2"/>'), "shape 1: the runs"),
        (document(POLYGON, width=61), "61 x 40"),
        (document(POLYGON, name="b.png"), "b.png.*--images"),
        (document(POLYGON)[:-20], "truncated"),
        ("<annotations><track id='0'/></annotations>", "video"),
        ("<annotations/>", "no <image>"),
    ],
)
def test_malformed(folder: Path, text: str, words: str) -> None:
    write(folder / "annotations.xml", text)
    with pytest.raises(InputError, match=words) as error:
        read(folder)
    assert "annotations.xml" in str(error.value) and "\n" not in str(error.value)


def test_voc_xml_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.xml", "<annotation><object/></annotation>")
    with pytest.raises(InputError, match="Pascal VOC.*SegmentationObject"):
        recognize(path)
