"""Pictures of instances: translucent masks, outlines and labels that stay readable on busy photographs."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from solov2.errors import InputError
from solov2.ops.images import to_rgb_tensor
from solov2.ops.masks import decode_rle

Point = tuple[int, int]  # x, y in pixels
Color = tuple[int, int, int]

PAPER = (250, 250, 250)  # background and ink of sheets
INK = (30, 30, 30)


@dataclass(frozen=True)
class Instance:
    """One instance to draw. Only the surroundings of its mask are kept: 100 planes of a large photo fill memory."""

    text: str
    color: Color
    corner: Point  # upper left of the neighbourhood in the picture
    mask: np.ndarray  # bool[h,w] of the neighbourhood, with at least one pixel

    @classmethod
    def cut_out(cls, mask: np.ndarray, text: str, color: Color, *, margin: int, scale: int) -> Instance:
        """Keep the tight box of bool[H,W], widened by a margin as far as the picture goes and enlarged by `scale`."""
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        top, left = max(0, int(rows[0]) - margin), max(0, int(columns[0]) - margin)
        window = mask[top : int(rows[-1]) + 1 + margin, left : int(columns[-1]) + 1 + margin]
        return cls(text, color, (scale * left, scale * top), window.repeat(scale, axis=0).repeat(scale, axis=1))

    @property
    def area(self) -> int:
        """Pixels of the mask."""
        return int(self.mask.sum())

    def region(self, plane: np.ndarray) -> np.ndarray:
        """View of a plane [H,W,...] at the neighbourhood."""
        (left, top), (height, width) = self.corner, self.mask.shape
        return plane[top : top + height, left : left + width]

    def points(self) -> tuple[Point, Point]:
        """Two pixels of the mask: the middle of its top row, and one in its middle that is surely inside."""
        pixels_to_row = self.mask.sum(1).cumsum()
        top, middle = np.searchsorted(pixels_to_row, [1, pixels_to_row[-1] / 2]).tolist()
        return self._middle_of_row(top), self._middle_of_row(middle)

    def _middle_of_row(self, row: int) -> Point:
        columns = np.flatnonzero(self.mask[row])
        return self.corner[0] + int(columns[len(columns) // 2]), self.corner[1] + row


def draw_instances(
    image: str | Path | Image.Image | np.ndarray | Tensor,
    result: Mapping[str, Any],
    class_names: Sequence[str],
    *,
    score_threshold: float = 0.3,
    alpha: float = 0.45,
    scale: int = 1,
) -> Image.Image:
    """Draw instances on a copy of an image.

    Large instances are drawn first, so that small ones in front stay visible. Colours follow the order in the result.

    Args:
        image: path, PIL image, u8[H,W,3] array or u8[3,H,W] tensor.
        result: `labels` i64[N] and `masks`, bool or u8[N,H,W] or a list of N RLE dicts; `scores` f32[N] where there are
            any. Without scores (ground truth) all instances are drawn and labelled with their class only.
        class_names: name of each label.
        score_threshold: leave out instances below this score.
        alpha: share of the colour inside a mask, 0 to 1.
        scale: enlarge image and masks by this whole factor first: labels on a 200 pixel image would hide it.

    Returns:
        RGB picture of the image's size times `scale`.

    Raises:
        InputError: masks of another size than the image, or a label without a name.
    """
    picture = Image.fromarray(to_rgb_tensor(image).permute(1, 2, 0).cpu().numpy())
    size = (picture.height, picture.width)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)
    labels, scores = torch.as_tensor(result["labels"]).tolist(), _scores(result)
    kept = [index for index in range(len(labels)) if scores is None or scores[index] >= score_threshold]
    width = max(1, round(min(picture.size) / 240))
    instances = []
    for rank, index in enumerate(kept):
        text = _label_text(labels[index], None if scores is None else scores[index], class_names)
        mask = _mask_array(result["masks"][index], size)
        if mask.any():  # a final mask may be empty: there is nothing that a label could name
            instances.append(Instance.cut_out(mask, text, instance_color(rank), margin=width + 1, scale=scale))
    picture = Image.fromarray(_paint(np.array(picture), instances, alpha, width))
    _draw_labels(picture, instances)
    return picture


def instance_color(index: int) -> Color:
    """RGB colour of the instance of this rank; neighbours in rank are far apart in hue, the list never ends."""
    hue = (0.58 + index * 0.618034) % 1.0  # steps of the golden section never come close to an earlier hue for long
    saturation, value = ((0.85, 1.0), (0.6, 1.0), (0.95, 0.8))[index // 5 % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def side_by_side(left: Image.Image, right: Image.Image, titles: tuple[str, str] | None = None) -> Image.Image:
    """Two pictures next to each other, the right one scaled to the height of the left one, titles above."""
    width = max(1, round(right.width * left.height / right.height))
    right = right.resize((width, left.height), Image.Resampling.LANCZOS)
    gap = max(4, left.height // 80)
    columns = ((0, left.width), (left.width + gap, right.width))
    top = _title_height(left.height) if titles else 0
    sheet = Image.new("RGB", (left.width + gap + right.width, top + left.height), PAPER)
    sheet.paste(left, (0, top))
    sheet.paste(right, (left.width + gap, top))
    if titles:
        _draw_titles(sheet, titles, columns, top)
    return sheet


def contact_sheet(
    rows: Sequence[tuple[Image.Image, Image.Image]],
    titles: tuple[str, str] = ("ground truth", "predictions"),
    cell: int = 560,
) -> Image.Image:
    """Pairs of pictures as the rows of one sheet, each picture fitted into a square of `cell` pixels.

    Raises:
        InputError: no rows.
    """
    if not rows:
        raise InputError("a contact sheet needs at least one pair of pictures")
    gap, top = max(4, cell // 70), _title_height(cell)
    fitted = [(_fit(left, cell), _fit(right, cell)) for left, right in rows]
    heights = [max(left.height, right.height) for left, right in fitted]
    sheet = Image.new("RGB", (2 * cell + 3 * gap, top + sum(heights) + gap * len(rows)), PAPER)
    _draw_titles(sheet, titles, ((gap, cell), (2 * gap + cell, cell)), top)
    y = top
    for pair, height in zip(fitted, heights, strict=True):
        for column, picture in enumerate(pair):
            x = gap + column * (cell + gap) + (cell - picture.width) // 2
            sheet.paste(picture, (x, y + (height - picture.height) // 2))
        y += height + gap
    return sheet


def _scores(result: Mapping[str, Any]) -> list[float] | None:
    scores = result.get("scores")
    return None if scores is None else torch.as_tensor(scores).tolist()


def _label_text(label: int, score: float | None, class_names: Sequence[str]) -> str:
    if not 0 <= label < len(class_names):
        raise InputError(f"label {label} has no name: there are {len(class_names)} class names")
    return class_names[label] if score is None else f"{class_names[label]} {score:.2f}"


def _mask_array(mask: Tensor | np.ndarray | Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    """One mask as bool[H,W]."""
    array = np.asarray(torch.as_tensor(decode_rle(dict(mask)) if isinstance(mask, Mapping) else mask).cpu()) > 0
    if array.shape != size:
        raise InputError(f"masks of {array.shape} (height, width) do not fit an image of {size}")
    return array


def _paint(photo: np.ndarray, instances: Sequence[Instance], alpha: float, width: int) -> np.ndarray:
    """Fill and outline masks on a copy of u8[H,W,3], the largest first, with lines of `width` pixels.

    Each fill starts from the photograph, not from the fills below: mixed colours would belong to no instance.
    """
    pixels = photo.copy()
    order = sorted(instances, key=lambda instance: -instance.area)
    for instance in order:
        inside = instance.mask
        fill = (1 - alpha) * instance.region(photo)[inside] + alpha * np.asarray(instance.color, np.float32)
        instance.region(pixels)[inside] = fill
    for instance in order:
        inside, region, color = instance.mask, instance.region(pixels), np.asarray(instance.color, np.float32)
        # A dark rim outside the bright line shows the outline on light and on dark ground.
        rim = _grow(inside, max(1, width // 2)) & ~inside
        line = inside & _grow(~inside, width)
        region[rim] = 0.4 * region[rim] + 0.15 * color
        region[line] = 0.7 * color + 0.3 * 255
    return pixels


def _grow(mask: np.ndarray, pixels: int) -> np.ndarray:
    """bool[h,w] grown by some pixels in all eight directions."""
    plane = torch.from_numpy(mask).float()[None]
    for kernel in ((2 * pixels + 1, 1), (1, 2 * pixels + 1)):
        plane = F.max_pool2d(plane, kernel, stride=1, padding=(kernel[0] // 2, kernel[1] // 2))
    return plane[0].bool().numpy()


def _draw_labels(picture: Image.Image, instances: Sequence[Instance]) -> None:
    """One label per instance on the picture, tied to its mask by a line where it had to go further away."""
    font_size = max(11, round(min(picture.size) / (30 if len(instances) <= 12 else 40)))  # a crowd leaves less room
    font = ImageFont.load_default(size=font_size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # what a size asks for
    pad = max(2, font_size // 5)
    height = sum(font.getmetrics()) + pad
    weight = _hiding_cost(instances, (picture.height, picture.width), label_area=6 * height * height)
    points, taken = [instance.points() for instance in instances], np.zeros((0, 4))
    for instance, ends in zip(instances, points, strict=True):
        size = (math.ceil(font.getlength(instance.text)) + 2 * pad, height)
        taken = np.vstack([taken, _label_place(size, ends, taken, weight)])
    places = [tuple(place) for place in taken.astype(int).tolist()]
    draw = ImageDraw.Draw(picture)
    for instance, place, ends in zip(instances, places, points, strict=True):  # lines first: none may cross a label
        if _distances(np.array([place]), ends)[0] > height / 2:
            end = ends[1]
            start = (min(max(end[0], place[0]), place[2]), min(max(end[1], place[1]), place[3]))
            draw.line((start, end), fill=(0, 0, 0), width=pad + 1)
            draw.line((start, end), fill=instance.color, width=max(1, pad - 1))
    for instance, place in zip(instances, places, strict=True):
        draw.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=instance.color)
        draw.text((place[0] + pad, place[1] + pad // 2), instance.text, fill=_ink_on(instance.color), font=font)


def _label_place(size: tuple[int, int], points: Sequence[Point], taken: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The place of a label, [4] as x0, y0, x1, y1: inside the picture, off other labels, near its mask.

    Places around the top of the mask and around its middle are compared. Overlapping another label is worst, then
    distance from the mask, then hiding small instances.

    Args:
        size: width and height of the label.
        points: two points (x, y) of the mask, see `Instance.points`.
        taken: [K,4], the labels already placed.
        weight: [H+1,W+1], summed table of what it costs to hide a pixel.
    """
    width, height = size
    rows = [-1, 0, -0.5, 0.5, *(side * step / 2 for step in range(3, 15) for side in (-1, 1))]
    shifts = np.array([(column * width, row * height) for row in rows for column in (-0.5, -0.1, -0.9, 0.1, -1.1)])
    corners = np.concatenate([np.array(point) + shifts for point in points]).round()
    bounds = np.array([weight.shape[1] - 1, weight.shape[0] - 1])  # width and height of the picture
    corners = corners.clip(0, np.maximum(0, bounds - size))
    places = np.concatenate([corners, corners + size], axis=1)
    shared = np.minimum(places[:, None, 2:], taken[:, 2:]) - np.maximum(places[:, None, :2], taken[:, :2])
    overlap = shared.clip(0).prod(2).sum(1) / (width * height)
    x0, y0, x1, y1 = np.minimum(places, np.tile(bounds, 2)).astype(int).T
    hidden = (weight[y1, x1] - weight[y0, x1] - weight[y1, x0] + weight[y0, x0]) / (width * height)
    cost = 100 * overlap + _distances(places, points) / height + 2 * hidden + 0.002 * np.arange(len(places))
    return places[cost.argmin()]


def _distances(places: np.ndarray, points: Sequence[Point]) -> np.ndarray:
    """Distance of each place [P,4] from the nearest of the points, in pixels; 0 where the point lies inside."""
    gaps = [np.maximum(places[:, :2] - point, point - places[:, 2:]).clip(0) for point in np.array(points)]
    return np.min([np.hypot(*gap.T) for gap in gaps], axis=0)


def _hiding_cost(instances: Sequence[Instance], size: tuple[int, int], label_area: int) -> np.ndarray:
    """Summed table [H+1,W+1] of the cost of hiding a pixel: 1 on instances smaller than a label, less on others."""
    cost = np.zeros(size, dtype=np.float32)
    for instance in instances:
        region = instance.region(cost)
        region[instance.mask] = np.maximum(region[instance.mask], min(1.0, label_area / instance.area))
    return np.pad(cost.cumsum(0, dtype=np.float64).cumsum(1), ((1, 0), (1, 0)))


def _ink_on(color: Color) -> Color:
    """Black or white, whichever contrasts more with the colour (WCAG relative luminance)."""
    red, green, blue = ((channel / 255) ** 2.2 for channel in color)
    return (0, 0, 0) if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else (255, 255, 255)


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    factor = cell / max(picture.size)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _title_height(height: int) -> int:
    return max(20, height // 16)


def _draw_titles(
    sheet: Image.Image, titles: tuple[str, str], columns: tuple[tuple[int, int], tuple[int, int]], height: int
) -> None:
    """Titles centred over the columns, each (x, width)."""
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=round(0.6 * height))
    for title, (x, width) in zip(titles, columns, strict=True):
        draw.text((x + width / 2, height / 2), title, fill=INK, font=font, anchor="mm")
