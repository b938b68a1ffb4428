"""`solov2 predict --format`: every format, read by a reader that is not ours, has the same instances and masks."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import supervision
import torch
from PIL import Image
from pycocotools.coco import COCO

from solov2.errors import InputError
from solov2.formats.recognize import read
from solov2.ops.masks import encode_rle
from solov2.prediction.outcome import annotated_ids, ordered_lines, summary, write_outcome
from solov2.prediction.sources import Source, plan_jobs
from solov2.prediction.writers import FORMATS, Item, ResultWriter, check_formats, planned_files, planned_tables

SIZE = (40, 60)


class Model:
    """What the writers use of a model."""

    class_names = ["disc", "ring: a", "star"]
    category_ids = [7, 3, 5]
    semantic_head = None


def planes() -> np.ndarray:
    """Four masks: with a hole and an island in it, of two parts, plain and overlapping the second, and empty."""
    masks = np.zeros((4, *SIZE), dtype=bool)
    masks[0, 3:23, 2:30] = True
    masks[0, 6:18, 6:24] = False
    masks[0, 9:13, 10:15] = True
    masks[0, 10, 12] = False
    masks[1, 25:35, 5:15] = masks[1, 20:30, 40:55] = True
    masks[2, 28:38, 44:58] = True
    return masks


def result(masks: np.ndarray, labels: list[int]) -> dict[str, Any]:
    boxes = []
    for mask in masks:
        rows, columns = np.nonzero(mask)
        found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if len(rows) else (0, 0, 0, 0)
        boxes.append([float(value) for value in found])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6][: len(masks)])
    rles = encode_rle(torch.from_numpy(masks))
    return {"scores": scores, "labels": torch.tensor(labels), "masks": rles, "boxes": torch.tensor(boxes)}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """All formats of two images, the second without an instance, and of none that could not be read."""
    photos = tmp_path / "photos"
    (photos / "b").mkdir(parents=True)
    for name in ("a.bmp", "b/c.jpg", "broken.jpg"):
        Image.new("RGB", SIZE[::-1], (200, 30, 0)).save(photos / name)
    sources = [Source(str(photos / "a.bmp")), Source(str(photos / "b" / "c.jpg"), folder=Path("b")),
               Source(str(photos / "broken.jpg"))]  # fmt: skip
    jobs, out = plan_jobs(sources, unique_stems=True), tmp_path / "out"
    writer = ResultWriter(out, FORMATS, Model())  # type: ignore[arg-type]
    finished, empty = {}, np.zeros((0, *SIZE), dtype=bool)
    for job, found in zip(jobs, (result(planes(), [0, 1, 1, 2]), result(empty, []))):
        found["boxes"] = found["boxes"].reshape(-1, 4)
        pixels = torch.zeros(3, *SIZE, dtype=torch.uint8)
        line = writer.write(Item(job.name, job.source.name, job.picture), job.number, pixels, found)
        finished[job.name.as_posix()] = [json.loads(json.dumps(line))]
    lines, ids = ordered_lines(jobs, finished, None)
    write_outcome(writer, lines, ids, str(out / "found.json"))
    expected = [file for job in jobs[:2] for file in planned_files(out, FORMATS, job.name, job.picture)]
    made = {file for file in out.rglob("*") if file.is_file()}
    assert made == {*expected, *planned_tables(out, FORMATS), out / "found.json"}
    (out / "losses").write_text("\n".join(summary(lines, [sources[2].name], 3)))
    return out


def same(masks: np.ndarray, expected: np.ndarray) -> bool:
    """Whether the masks are equal, in any order."""
    return sorted(mask.tobytes() for mask in masks > 0) == sorted(mask.tobytes() for mask in expected)


def test_coco_in_pycocotools_and_supervision(written: Path) -> None:
    dataset = COCO(str(written / "coco.json"))
    assert [image["file_name"] for image in dataset.loadImgs([1, 2])] == ["a.bmp", "b/c.jpg"]
    assert [category["id"] for category in dataset.dataset["categories"]] == [7, 3, 5]
    results = dataset.loadRes(str(written / "coco_results.json"))
    found = results.loadAnns(results.getAnnIds([1]))
    assert [(entry["category_id"], round(entry["score"], 6)) for entry in found] == [
        (7, 0.9),
        (3, 0.8),
        (3, 0.7),
        (5, 0.6),
    ]
    assert same(np.stack([results.annToMask(entry) for entry in found]), planes())
    assert not results.getAnnIds([2])
    assert json.loads((written / "found.json").read_text()) == json.loads((written / "coco_results.json").read_text())

    for name in ("a.bmp", "b/c.jpg"):  # supervision opens the images
        (written / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE[::-1]).save(written / "images" / name)
    content = json.loads((written / "coco.json").read_text())
    for entry in content["annotations"]:  # it takes uncompressed RLEs
        mask = coco_mask.decode(entry["segmentation"])
        runs = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=0, append=0))
        counts = np.diff([0, *runs.tolist(), mask.size]).tolist()
        entry["segmentation"] = {"size": list(SIZE), "counts": counts}
        entry["iscrowd"] = 1  # and RLEs of crowds only
    content["annotations"] = [entry for entry in content["annotations"] if entry["area"]]
    (written / "plain.json").write_text(json.dumps(content))
    loaded = supervision.DetectionDataset.from_coco(
        str(written / "images"), str(written / "plain.json"), force_masks=True
    )
    detections = loaded.annotations[str(written / "images" / "a.bmp")]
    assert same(detections.mask, planes()[:3]) and len(loaded.annotations[str(written / "images" / "b/c.jpg")]) == 0


def test_yolo_in_supervision(written: Path) -> None:
    images = written / "yolo" / "images"
    (images / "b").mkdir(parents=True)
    Image.new("RGB", SIZE[::-1]).save(images / "a.bmp")
    Image.new("RGB", SIZE[::-1]).save(images / "b" / "c.jpg")
    assert (written / "yolo" / "images.txt").read_text() == "./images/a.bmp\n./images/b/c.jpg\n"
    loaded = supervision.DetectionDataset.from_yolo(
        str(images), str(written / "yolo" / "labels"), str(written / "yolo" / "data.yaml"), force_masks=True
    )
    assert loaded.classes == Model.class_names
    detections = loaded.annotations[str(images / "a.bmp")]
    assert sorted(detections.class_id.tolist()) == [0, 1, 1]
    # Its rasterizer also sets the pixels on the lower and right border of an outline, and fills holes.
    covered = [max((mask & other).sum() / mask.sum() for other in detections.mask) for mask in planes()[:3]]
    assert min(covered) == 1
    reading = read(written / "yolo", None, "yolo")  # our reader draws as pycocotools does
    [first, second] = reading.images
    drawn = [coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(x.segmentation, *SIZE))) for x in first.instances]
    assert same(np.stack(drawn), planes()[:3]) and not second.instances


def test_labelme_by_its_schema(written: Path) -> None:
    content = json.loads((written / "labelme" / "a.json").read_text())
    assert {key: type(value) for key, value in content.items()} == {
        "version": str, "flags": dict, "shapes": list, "imagePath": str, "imageData": type(None), "imageHeight": int,
        "imageWidth": int,
    }  # fmt: skip
    assert (written / "labelme" / content["imagePath"]).resolve().name == "a.bmp"
    assert (written / "labelme" / content["imagePath"]).is_file()
    assert (content["imageHeight"], content["imageWidth"]) == SIZE
    groups: dict[Any, list[Any]] = {}
    for number, shape in enumerate(content["shapes"]):
        assert set(shape) == {"label", "points", "group_id", "description", "shape_type", "flags"}
        assert shape["shape_type"] == "polygon" and shape["label"] in Model.class_names and len(shape["points"]) >= 3
        assert all(len(point) == 2 for point in shape["points"])
        key = f"shape {number}" if shape["group_id"] is None else shape["group_id"]
        groups.setdefault(key, []).append([value for point in shape["points"] for value in point])
    # The parts of the first mask are its ring and the island in its hole, in one outline.
    drawn = [coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(parts, *SIZE))) for parts in groups.values()]
    assert same(np.stack(drawn), planes()[:3])
    assert json.loads((written / "labelme" / "b" / "c.json").read_text())["shapes"] == []


def test_geojson_has_holes(written: Path) -> None:
    content = json.loads((written / "geojson" / "a.geojson").read_text())
    assert content["type"] == "FeatureCollection" and len(content["features"]) == 4
    drawn = []
    for feature in content["features"]:
        plane = np.zeros(SIZE, dtype=bool)
        assert feature["type"] == "Feature" and feature["geometry"]["type"] == "MultiPolygon"
        for polygon in feature["geometry"]["coordinates"]:
            assert all(ring[0] == ring[-1] for ring in polygon)
            outline, *holes = (
                coco_mask.decode(coco_mask.frPyObjects([np.array(ring[:-1]).ravel().tolist()], *SIZE))[:, :, 0] > 0
                for ring in polygon
            )
            assert all((outline | hole == outline).all() for hole in holes)
            plane |= outline & ~np.any([np.zeros(SIZE, dtype=bool), *holes], axis=0)
        drawn.append(plane)
    assert (np.stack(drawn) == planes()).all()
    rings = [len(polygon) for polygon in content["features"][0]["geometry"]["coordinates"]]
    assert sorted(rings) == [2, 2]  # the ring with its hole, the island with its own
    assert [feature["properties"]["category_id"] for feature in content["features"]] == [7, 3, 3, 5]


def test_png_keeps_the_best_where_instances_overlap(written: Path) -> None:
    assert (written / "png" / "classes.txt").read_text().splitlines() == Model.class_names
    with Image.open(written / "png" / "masks" / "a.png") as picture:
        red, green, blue = np.asarray(picture).astype(int).transpose(2, 0, 1)
    numbers = red + 256 * green + 65536 * blue
    masks = planes()
    assert {*np.unique(numbers).tolist()} == {0, 1001, 2001, 2002}
    assert ((numbers == 1001) == masks[0]).all()
    assert ((numbers == 2002) == masks[1]).all() and ((numbers == 2001) == (masks[2] & ~masks[1])).all()


def test_csv(written: Path) -> None:
    with open(written / "instances.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image_id"], row["category_name"]) for row in rows] == [
        ("1", "disc"), ("1", "ring: a"), ("1", "ring: a"), ("1", "star")
    ]  # fmt: skip
    assert [int(row["area"]) for row in rows] == planes().sum((1, 2)).tolist()
    box = [float(rows[0][key]) for key in ("x", "y", "box_width", "box_height")]
    assert box == [2, 3, 28, 20] and Path(rows[0]["file_name"]).name == "a.bmp" and float(rows[1]["score"]) > 0.79


def test_what_formats_cannot_hold_is_counted(written: Path) -> None:
    lines = (written / "losses").read_text().splitlines()
    assert lines[0].startswith("not read: 1 of 3 sources") and "broken.jpg" in lines[0]
    assert "csv: 4 masks, of which it has only box and area" in lines
    assert "png: 22 pixels of overlaps, kept by the last instance" in lines
    for name in ("labelme", "yolo", "png"):
        assert f"{name}: 3 scores, left out" in lines and f"{name}: 1 instances without a pixel, left out" in lines


def test_image_ids_of_an_annotation_file(tmp_path: Path) -> None:
    jobs = plan_jobs([Source("photos/val/a.jpg"), Source("photos/train/a.jpg"), Source("b.jpg")])
    path = tmp_path / "annotations.json"
    images = [{"id": 30, "file_name": "val/a.jpg"}, {"id": "x", "file_name": "a.jpg"}, {"id": 5, "file_name": "b.jpg"}]
    path.write_text(json.dumps({"images": images}))
    assert annotated_ids(path, jobs) == {"a.jpg": 30, "a_2.jpg": "x", "b.jpg": 5}
    for broken, word in ((images[:2], r"b\.jpg"), ([{"file_name": "b.jpg"}], "image 1"), (None, "images")):
        path.write_text(json.dumps({"images": broken}))
        with pytest.raises(InputError, match=word):
            annotated_ids(path, jobs)


def test_class_names_that_a_table_cannot_hold() -> None:
    check_formats(["yolo"], ["a\nb"])
    with pytest.raises(InputError, match="png"):
        check_formats(["png"], ["a\nb"])
