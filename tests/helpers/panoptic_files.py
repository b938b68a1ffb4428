"""Small panoptic annotation files, PNGs and images for tests to corrupt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from solov2.ops.panoptic import rgb_from_ids

HEIGHT, WIDTH = 48, 64  # of the images
CATEGORIES = [  # things and stuff alternate, and are not sorted by id
    {"id": 9, "name": "bus", "isthing": 1, "supercategory": "vehicle"},
    {"id": 2, "name": "road", "isthing": 0},
    {"id": 4, "name": "car", "isthing": 1},
    {"id": 20, "name": "sky", "isthing": 0},
    {"id": 11, "name": "grass", "isthing": 0},
]  # labels: car 0, bus 1; road 0, grass 1, sky 2


def segment(number: int, category: int, box: tuple[int, int, int, int], **changes: Any) -> dict[str, Any]:
    """An entry of `segments_info`, a rectangle that fills its box; `changes` replace its keys or add some."""
    return {
        "id": number, "category_id": category, "area": box[2] * box[3], "bbox": list(box), "iscrowd": 0, **changes,
    }  # fmt: skip


def paint(segments: list[dict[str, Any]], size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    """The map of rectangles, int32 [H, W]; later ones lie on top."""
    ids = np.zeros(size, dtype=np.int32)
    for entry in segments:
        x, y, width, height = entry["bbox"]
        ids[y : y + height, x : x + width] = entry["id"]
    return ids


class PanopticTree:
    """A valid panoptic tree of three small images; tests change `content` before they write it to `file`.

    Segments: image 1 a car, a crowd of buses, road and sky; image 2 only grass; image 3 only a bus. A third of image 1
    is void.
    """

    def __init__(self, folder: Path) -> None:
        self.file, self.segments, self.images = folder / "panoptic.json", folder / "panoptic", folder / "images"
        self.segments.mkdir()
        self.images.mkdir()
        entries = {
            1: [segment(70001, 4, (4, 4, 20, 12)), segment(300, 9, (30, 4, 10, 8), iscrowd=1),
                segment(2**24 - 1, 2, (0, 40, 64, 8)), segment(7, 20, (0, 20, 64, 16))],
            2: [segment(70001, 11, (0, 10, 64, 38))],
            3: [segment(5, 9, (10, 10, 30, 30))],
        }  # fmt: skip
        self.content: dict[str, Any] = {
            "images": [{"id": n, "file_name": f"{n}.jpg", "width": WIDTH, "height": HEIGHT} for n in entries],
            "annotations": [
                {"image_id": n, "file_name": f"{n}.png", "segments_info": found} for n, found in entries.items()
            ],
            "categories": [dict(category) for category in CATEGORIES],
        }
        for number, found in entries.items():
            Image.fromarray(np.full((HEIGHT, WIDTH, 3), number, dtype=np.uint8)).save(self.images / f"{number}.jpg")
            self.save(f"{number}.png", paint(found))
        self.write()

    @property
    def first(self) -> dict[str, Any]:
        """The first annotation."""
        return self.content["annotations"][0]

    def infos(self, annotation: int = 0) -> list[dict[str, Any]]:
        """The segments of an annotation."""
        return self.content["annotations"][annotation]["segments_info"]

    def save(self, name: str, ids: np.ndarray) -> None:
        """Write a map as a PNG."""
        Image.fromarray(rgb_from_ids(ids)).save(self.segments / name)

    def read(self, name: str) -> np.ndarray:
        """The colors of a PNG, uint8 [H, W, 3]."""
        return np.array(Image.open(self.segments / name))

    def write(self) -> Path:
        """Write `content`; returns the file."""
        self.file.write_text(json.dumps(self.content))
        return self.file
