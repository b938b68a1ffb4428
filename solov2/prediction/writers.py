"""The output formats of `solov2 predict`: files for each image as soon as it is predicted, and files about all images
at the end, made from the lines of the log of finished images.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pycocotools.mask as coco_mask
import yaml
from PIL import Image
from torch import Tensor

from solov2.data.annotations import ImageId
from solov2.errors import InputError
from solov2.formats import labelme, masks, yolo
from solov2.formats.annotated import AnnotatedImage, AnnotatedInstance, Losses, compressed
from solov2.formats.outlines import trace
from solov2.ops.panoptic import rgb_from_ids
from solov2.outputs import replace_file, write_json, write_picture
from solov2.visualize import draw_instances
from solov2.visualize_panoptic import draw_panoptic

if TYPE_CHECKING:
    from solov2.data.panoptic_results import PanopticWriter
    from solov2.models.solov2 import SOLOv2

PLACES = {"labelme": ("labelme", ".json"), "yolo": ("yolo/labels", ".txt"), "geojson": ("geojson", ".geojson"),
          "png": ("png/masks", ".png")}  # fmt: skip
TABLES = {"coco": ("coco_results.json", "coco.json"), "csv": ("instances.csv",),
          "yolo": ("yolo/data.yaml", "yolo/images.txt"), "png": ("png/classes.txt",)}  # fmt: skip
FORMATS = ("pictures", "coco", "labelme", "yolo", "geojson", "png", "csv")
COLUMNS = ("image_id", "file_name", "height", "width", "category_id", "category_name", "score", "x", "y", "box_width",
           "box_height", "area")  # fmt: skip


@dataclass(frozen=True)
class Item:
    """An image, or a frame of a video, to be written.

    Attributes:
        name: of its outputs, relative to the output folder, with the suffix of the source.
        file_name: in the results: as the source was given.
        picture: relative to the output folder; None for a frame, whose picture is part of a video.
    """

    name: Path
    file_name: str
    picture: Path | None


class ResultWriter:
    """Writes results in some formats below a folder.

    Args:
        folder: of the outputs.
        formats: of `FORMATS`.
        model: has the names and category ids of the labels.
        panoptic: writes the panoptic segments, too; pictures then show them.
    """

    def __init__(
        self, folder: Path, formats: Sequence[str], model: SOLOv2, panoptic: PanopticWriter | None = None
    ) -> None:
        self.folder, self.formats, self.model, self.panoptic = folder, formats, model, panoptic

    def draw(self, pixels: Tensor, result: Mapping[str, Any]) -> Image.Image:
        """The picture of a result over its image, uint8 [3, H, W]."""
        if self.panoptic is not None:
            return draw_panoptic(pixels, result, self.model)
        return draw_instances(pixels, result, self.model.class_names, score_threshold=0.0)

    def write(self, item: Item, number: int, pixels: Tensor, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write the files of an image.

        Args:
            item: what the image is called.
            number: its number in the run, the id of its panoptic segments.
            pixels: uint8 [3, H, W].
            result: scores float32 [N], labels int64 [N], masks N RLEs, boxes float32 [N, 4], and panoptic segments.

        Returns:
            A line for the log, with all that the files about all images need.
        """
        height, width = pixels.shape[1:]
        line: dict[str, Any] = {
            "output": item.name.as_posix(),
            "file_name": item.file_name,
            "height": height,
            "width": width,
            "entries": coco_entries(result, self.model),
        }
        if self.panoptic is not None:
            name = (item.picture or item.name).as_posix()
            self.panoptic.add(number, name, result)
            line["panoptic"] = self.panoptic.entries[number]
        losses = dict[str, int]()
        for name in (name for name in self.formats if name in PLACES):
            lost = Losses()
            self._write_format(name, item, self._annotated(item, line, lost), lost, line)
            losses |= {f"{name}: {kind}": count for kind, count in lost.counts.items()}
        if "csv" in self.formats and line["entries"]:
            losses["csv: masks, of which it has only box and area"] = len(line["entries"])
        if "pictures" in self.formats and item.picture is not None:
            write_picture(self.folder / item.picture, self.draw(pixels, result))
        return line | {"losses": losses}

    def _annotated(self, item: Item, line: Mapping[str, Any], losses: Losses) -> AnnotatedImage:
        """The instances with a pixel, the best last, so that it covers the others where they cannot overlap."""
        image = AnnotatedImage(item.name.as_posix(), line["height"], line["width"])
        for entry in reversed(line["entries"]):
            if coco_mask.area(compressed(entry["segmentation"], (image.height, image.width))) == 0:
                losses.add("instances without a pixel, left out", image.file_name)
                continue
            image.instances.append(AnnotatedInstance(entry["category_name"], entry["segmentation"]))
        return image

    def _write_format(
        self, name: str, item: Item, image: AnnotatedImage, losses: Losses, line: Mapping[str, Any]
    ) -> None:
        path = output_file(self.folder, name, item.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        classes = self.model.class_names
        if name != "geojson":
            losses.add("scores, left out", image.file_name, len(image.instances))
        if name == "png":
            write_picture(path, Image.fromarray(rgb_from_ids(masks.numbers_of(image, classes, losses))))
        elif name == "labelme":
            beside = os.path.relpath(item.file_name, path.parent) if os.path.exists(item.file_name) else item.file_name
            write_json(path, labelme.document(image, beside.replace(os.sep, "/"), losses), indent=1)
        elif name == "geojson":
            write_json(path, features(line))
        else:
            with replace_file(path) as file:
                file.write("".join(f"{text}\n" for text in yolo.lines(image, classes, losses)).encode())

    def close(self, lines: Sequence[Mapping[str, Any]], image_ids: Sequence[ImageId]) -> None:
        """Write the files about all images: their lines, in order, and the id of each."""
        entries = list(with_image_ids(lines, image_ids))
        if "coco" in self.formats:
            results, dataset = (self.folder / name for name in TABLES["coco"])
            write_json(results, entries)
            write_json(dataset, coco_dataset(lines, image_ids, entries, self.model))
        if "csv" in self.formats:
            _write_text(self.folder / TABLES["csv"][0], csv_table(lines, entries))
        if "yolo" in self.formats:
            table, listed = (self.folder / name for name in TABLES["yolo"])
            names = {
                "path": ".",
                "train": listed.name,
                "val": listed.name,
                "names": dict(enumerate(self.model.class_names)),
            }
            _write_text(table, yaml.safe_dump(names, sort_keys=False, allow_unicode=True))
            _write_text(listed, "".join(f"./images/{line['output']}\n" for line in lines))
        if "png" in self.formats:
            _write_text(self.folder / TABLES["png"][0], "".join(f"{name}\n" for name in self.model.class_names))
        if self.panoptic is not None:
            self.panoptic.merge([{line["panoptic"][0]["id"]: line["panoptic"] for line in lines if "panoptic" in line}])
            self.panoptic.close(sorted(self.panoptic.entries))


def output_file(folder: Path, name: str, item: Path) -> Path:
    """The file of an image in the format `name`, one of `PLACES`."""
    place, suffix = PLACES[name]
    return folder / place / item.with_suffix(suffix)


def planned_files(folder: Path, formats: Sequence[str], name: Path, picture: Path | None) -> list[Path]:
    """All files that `ResultWriter.write` makes of an image in these formats."""
    files = [folder / picture] if "pictures" in formats and picture is not None else []
    return files + [output_file(folder, kind, name) for kind in formats if kind in PLACES]


def planned_tables(folder: Path, formats: Sequence[str]) -> list[Path]:
    """All files that `ResultWriter.close` makes in these formats."""
    return [folder / name for kind in formats for name in TABLES.get(kind, ())]


def check_formats(formats: Sequence[str], class_names: Sequence[str]) -> None:
    """Raise InputError if a format cannot hold a class name."""
    broken = next((name for name in class_names if len(name.splitlines()) != 1), None)
    if broken is not None and "png" in formats:
        raise InputError(f"the class name {broken!r} cannot be a line of {TABLES['png'][0]}; leave out --format png")


def coco_entries(result: Mapping[str, Any], model: SOLOv2) -> list[dict[str, Any]]:
    """The result of one image in COCO's results format, but for the image, ready for JSON, with class names added.

    Args:
        result: `scores` float32 [N], `labels` int64 [N], `masks` N RLE, `boxes` float32 [N, 4] xyxy.
        model: has the class name and the category id of each label.
    """
    rows = zip(*(result[key].tolist() for key in ("labels", "scores", "boxes")), strict=True)
    return [
        {
            "category_id": model.category_ids[label],
            "category_name": model.class_names[label],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "segmentation": rle,
            "score": score,
        }
        for (label, score, (x0, y0, x1, y1)), rle in zip(rows, result["masks"], strict=True)
    ]


def with_image_ids(lines: Iterable[Mapping[str, Any]], image_ids: Iterable[ImageId]) -> Iterator[dict[str, Any]]:
    """The entries of all lines with the id and the name of their image: COCO's results format."""
    for line, image_id in zip(lines, image_ids, strict=True):
        for entry in line["entries"]:
            yield {"image_id": image_id, "file_name": line["file_name"], **entry}


def coco_dataset(
    lines: Sequence[Mapping[str, Any]],
    image_ids: Sequence[ImageId],
    entries: Sequence[Mapping[str, Any]],
    model: SOLOv2,
) -> dict[str, Any]:
    """The results as a COCO dataset, whose annotations keep their scores: for tools that read nothing else."""
    sizes = {image_id: (line["height"], line["width"]) for line, image_id in zip(lines, image_ids, strict=True)}
    images = [
        {"id": image_id, "file_name": line["output"], "height": line["height"], "width": line["width"]}
        for line, image_id in zip(lines, image_ids, strict=True)
    ]
    annotations = [
        {**entry, "id": number, "iscrowd": 0, "area": _area(entry, sizes[entry["image_id"]])}
        for number, entry in enumerate(entries, start=1)
    ]
    pairs = zip(model.category_ids, model.class_names, strict=True)
    categories = [{"id": number, "name": name} for number, name in pairs]
    return {"images": images, "annotations": annotations, "categories": categories}


def csv_table(lines: Sequence[Mapping[str, Any]], entries: Sequence[Mapping[str, Any]]) -> str:
    """A row for each instance, with the columns `COLUMNS`; box and area in pixels."""
    sizes = {line["file_name"]: (line["height"], line["width"]) for line in lines}
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for entry in entries:
        size = sizes[entry["file_name"]]
        kind = (entry["category_id"], entry["category_name"], entry["score"])
        table.writerow([entry["image_id"], entry["file_name"], *size, *kind, *entry["bbox"], _area(entry, size)])
    return text.getvalue()


def features(line: Mapping[str, Any]) -> dict[str, Any]:
    """GeoJSON of one image: a MultiPolygon for each instance along the borders of its pixels, with y downward."""
    found = []
    for entry in line["entries"]:
        outlines, holes = trace(entry["segmentation"], (line["height"], line["width"]))
        properties = {key: entry[key] for key in ("category_id", "category_name", "score", "bbox")}
        geometry = {"type": "MultiPolygon", "coordinates": _nested(outlines, holes)}
        found.append({"type": "Feature", "properties": properties, "geometry": geometry})
    names = {key: line[key] for key in ("file_name", "height", "width")}
    return {"type": "FeatureCollection", "properties": names, "features": found}


def _nested(outlines: Sequence[Sequence[float]], holes: Sequence[Sequence[float]]) -> list[list[list[list[float]]]]:
    """Each outline followed by its holes, as closed rings."""
    parts = [[_ring(outline)] for outline in outlines]
    shapes = [np.array(part[0]) for part in parts]
    areas = [_ring_area(shape) for shape in shapes]
    for hole in map(_ring, holes):
        x, y = min(hole, key=lambda point: (point[1], point[0]))  # its upper left corner: the pixel there is inside
        around = [place for place, shape in enumerate(shapes) if _is_inside(shape, x + 0.5, y + 0.5)]
        parts[min(around, key=lambda place: areas[place])].append(hole)
    return parts


def _ring(outline: Sequence[float]) -> list[list[float]]:
    points = [list(point) for point in zip(outline[::2], outline[1::2])]
    return [*points, points[0]]


def _ring_area(ring: np.ndarray) -> float:
    x, y = ring.T
    return float(abs(np.dot(x[:-1], y[1:]) - np.dot(y[:-1], x[1:])) / 2)


def _is_inside(ring: np.ndarray, x: float, y: float) -> bool:
    """Whether a point is inside a ring of horizontal and vertical lines: an odd number of lines is to its left."""
    (x1, y1), (_, y2) = ring[:-1].T, ring[1:].T
    return bool(np.count_nonzero((x1 < x) & ((y1 < y) != (y2 < y))) % 2)


def _area(entry: Mapping[str, Any], size: tuple[int, int]) -> int:
    return int(coco_mask.area(compressed(entry["segmentation"], size)))


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as file:
        file.write(text.encode())
