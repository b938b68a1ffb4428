"""Label Studio's JSON: a list of tasks, each an image with `annotations`, whose `result` is a list of shapes.

Coordinates are in percent of the image. A brush has run lengths of RGBA pixels in Label Studio's own bit stream.
"""

from __future__ import annotations

import math
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from solov2.data.annotations import parse_json
from solov2.errors import InputError
from solov2.formats import fields
from solov2.formats.annotated import AnnotatedImage, Losses, Reading, Segmentation, add_instance, used_classes
from solov2.formats.image_folder import ImageFolder
from solov2.formats.outlines import ellipse, rectangle, turned
from solov2.ops.image_files import image_suffixes
from solov2.ops.masks import encode_rle

KINDS = ("polygon", "brush", "ellipse", "rectangle")  # with "labels" after it where the shape has its own


def is_label_studio(content: Any) -> bool:
    """Whether parsed JSON is an export of Label Studio."""
    first = content[0] if isinstance(content, list) and content else None
    return isinstance(first, dict) and isinstance(first.get("data"), dict) and "annotations" in first


def read(source: Path, images: Path | None) -> Reading:
    """Read a file.

    Args:
        source: the JSON file.
        images: folder of the images; None: the folder of the file.

    Raises:
        InputError: the file is malformed.
    """
    content = parse_json(source)
    if not is_label_studio(content):
        raise InputError(f"{source} is not an export of Label Studio in its JSON format (JSON-MIN is not read)")
    folder, losses, found = ImageFolder(images or source.parent), Losses(), dict[str, AnnotatedImage]()
    for task in fields.entries({"tasks": content}, "tasks", str(source)):
        where = f"{source.name}, task {task.get('id')}"
        done = [x for x in fields.entries(task, "annotations", where) if not x.get("was_cancelled")]
        if not done:
            losses.add("tasks without an annotation, left out", where)
            continue
        losses.add("annotations of a task after its first, left out", where, len(done) - 1)
        file = folder.find_or_count(source.name, losses, *_image_names(task, where))
        if file is None:
            continue
        shapes = fields.entries(done[0], "result", where)
        sizes = [size for shape in shapes if (size := fields.size_of(shape, "original_height", "original_width"))]
        image = folder.measure(file, where, stated=sizes[0] if sizes else None)
        if found.setdefault(file, image) is not image:
            raise InputError(f"{where} is the file {file}, as an earlier task is")
        _read_shapes(shapes, image, where, losses)
    folder.require_some(found.values(), losses)
    return Reading(source, folder.root, used_classes(found.values()), list(found.values()), losses)


def _image_names(task: dict[str, Any], where: str) -> list[str]:
    """Names that the image of a task may have: as it is stated, and without the eight digits of an upload."""
    data = fields.entry(task["data"], f"{where}: data")
    texts = [value for value in data.values() if isinstance(value, str)]
    names = [text.partition("?d=")[2] or text for text in texts]  # /data/local-files/?d=folder/1.jpg
    name = next((x for x in names if PurePosixPath(x.partition("?")[0]).suffix.lower() in image_suffixes()), None)
    if name is None:
        raise InputError(f"{where} names no image file in its data")
    upload = PurePosixPath(name).name
    return [name, upload[9:]] if upload[8:9] == "-" else [name]


def _read_shapes(shapes: list[dict[str, Any]], image: AnnotatedImage, where: str, losses: Losses) -> None:
    labels: dict[Any, str] = {}  # of a shape, which may be stated by another entry with its id
    for number, shape in enumerate(shapes, start=1):
        values = shape.get("value")
        lists = [v for k, v in values.items() if k.endswith("labels")] if isinstance(values, dict) else []
        chosen = next((x for x in lists if isinstance(x, list) and x), None)
        if chosen is not None:
            losses.add("labels of a shape after its first, left out", f"{where}, entry {number}", len(chosen) - 1)
            labels[shape.get("id", number)] = str(chosen[0])
    for number, shape in enumerate(shapes, start=1):
        place, kind = f"{where}, entry {number}", str(shape.get("type"))
        base = kind.removesuffix("labels")
        if base not in KINDS:
            known = kind in ("labels", "choices", "textarea", "rating")  # of a shape or of the image
            losses.add(f"shapes of the type {kind}, which have no mask, left out", place, int(not known))
            continue
        label = labels.get(shape.get("id", number))
        if label is None:
            losses.add("shapes without a label, left out", place)
            continue
        if shape.get("image_rotation"):
            raise InputError(f"{place} was drawn on an image that was turned in Label Studio; turn the file itself")
        losses.add("rectangles, taken as masks", place, int(base == "rectangle"))
        values = fields.entry(shape.get("value"), f"{place}: value")
        add_instance(image, label, _segmentation(values, base, image, place), place, losses)


def _segmentation(value: dict[str, Any], kind: str, image: AnnotatedImage, where: str) -> Segmentation:
    across, down = image.width / 100, image.height / 100
    if kind == "brush":
        mask = decode_brush(value.get("rle"), (image.height, image.width), where)
        return encode_rle(torch.from_numpy(mask)[None])[0]
    if kind == "polygon":
        points = fields.flat_points(value.get("points"), where)
        return [[number * (down if place % 2 else across) for place, number in enumerate(points)]]
    x, y = (side * scale for side, scale in zip(fields.numbers(value, where, "x", "y"), (across, down)))
    rotation = math.radians(fields.numbers(value, where, "rotation")[0]) if value.get("rotation") else 0.0
    if kind == "ellipse":
        radius_x, radius_y = fields.numbers(value, where, "radiusX", "radiusY")
        return [ellipse(x, y, radius_x * across, radius_y * down, rotation)]
    width, height = fields.numbers(value, where, "width", "height")  # turned around its first corner
    return [turned(rectangle(x, y, x + width * across, y + height * down), x, y, rotation)]


class _Bits:
    """Reads numbers from a bit stream, highest bit first."""

    def __init__(self, data: bytes) -> None:
        self.bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
        self.place = 0

    def read(self, size: int, number: int = 1) -> np.ndarray:
        """The next `number` values of `size` bits: int64 [number]. Raises ValueError at the end of the stream."""
        end = self.place + size * number
        if end > len(self.bits):
            raise ValueError("the stream ends too early")
        values = self.bits[self.place : end].reshape(number, size).astype(np.int64)
        self.place = end
        return values @ (1 << np.arange(size - 1, -1, -1))

    def next(self, size: int) -> int:
        """The next value of `size` bits."""
        return int(self.read(size)[0])


def decode_brush(data: Any, size: tuple[int, int], where: str) -> np.ndarray:
    """Label Studio's run lengths of the RGBA pixels of an image of `size` (h, w): uint8 [h, w] of 0 and 1.

    After the number of values, their bits and four bit widths, each block is one bit (repeated or literal), two bits
    (which width), the length less one, and one value or that many.

    Raises:
        InputError: they are no such stream, or of another size.
    """
    total = size[0] * size[1] * 4
    try:
        if not isinstance(data, list):
            raise ValueError("they must be a list")
        bits = _Bits(bytes(data))
        if bits.next(32) != total:
            raise ValueError(f"it is not of {size[1]} x {size[0]} pixels")
        word = bits.next(5) + 1
        widths = [bits.next(4) + 1 for _ in range(4)]
        values, place = np.zeros(total, dtype=np.int64), 0
        while place < total:
            repeated = bits.next(1)
            length = bits.next(widths[bits.next(2)]) + 1
            if place + length > total:
                raise ValueError("it has too many values")
            values[place : place + length] = bits.read(word, 1 if repeated else length)
            place += length
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where}: the brush has no valid run lengths ({error})") from None
    return (values.reshape(*size, 4)[..., 3] > 0).astype(np.uint8)  # alpha
