"""Small COCO annotation files and images for tests to corrupt."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 48, 64  # of the images


def rectangle(x: float, y: float, width: float, height: float) -> list[list[float]]:
    """A rectangle as COCO's list of one polygon."""
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def annotation(number: int, image: int, category: int, box: tuple[float, ...], **changes: Any) -> dict[str, Any]:
    """An entry of `annotations`, a rectangle that fills its box; `changes` replace its keys or add some."""
    return {
        "id": number, "image_id": image, "category_id": category, "bbox": list(box), "area": box[2] * box[3],
        "iscrowd": 0, "segmentation": rectangle(*box), **changes,
    }  # fmt: skip


def image_entry(number: int, name: str | None = None, width: int = WIDTH, height: int = HEIGHT) -> dict[str, Any]:
    """An entry of `images`."""
    return {"id": number, "file_name": name or f"{number}.png", "width": width, "height": height}


class CocoTree:
    """A valid COCO tree of three small images; tests change `content` before they write it to `file`."""

    def __init__(self, folder: Path) -> None:
        self.file, self.images = folder / "instances.json", folder / "images"
        self.images.mkdir()
        for number in (1, 2, 3):
            self.save(f"{number}.png", np.full((HEIGHT, WIDTH, 3), number, dtype=np.uint8))
        self.content = {
            "images": [image_entry(number) for number in (1, 2, 3)],
            "annotations": [
                annotation(11, 1, 1, (10, 8, 20, 16)), annotation(12, 1, 2, (40, 20, 12, 14)),
                annotation(21, 2, 1, (4, 4, 30, 30)), annotation(22, 2, 2, (36, 6, 20, 30)),
                annotation(31, 3, 2, (8, 8, 16, 16)), annotation(32, 3, 1, (30, 10, 10, 10)),
            ],
            "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "bus"}],
        }  # fmt: skip

    @property
    def first(self) -> dict:
        """The first annotation."""
        return self.content["annotations"][0]

    @property
    def image(self) -> dict:
        """The first entry of `images`."""
        return self.content["images"][0]

    def save(self, name: str, pixels: np.ndarray, mode: str | None = None, **options: Any) -> None:
        """Encode pixels into a file of the image folder."""
        Image.fromarray(pixels, mode).save(self.images / name, **options)

    def write(self, name: str, content: bytes) -> None:
        """Write bytes into a file of the image folder."""
        (self.images / name).write_bytes(content)

    def rename(self, name: str) -> None:
        """Change the file name of image 1."""
        self.image["file_name"] = name


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims a size but holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
