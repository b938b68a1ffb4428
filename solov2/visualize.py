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
CELL = 560  # pixels of the square that a picture of a sheet is fitted into
TITLES = ("ground truth", "predictions")
FILL = 0.45  # share of the color inside a mask


@dataclass(frozen=True)
class Instance:
    """One instance to draw. Only the surroundings of its mask are kept: 100 planes of a large photo fill memory."""

    text: str
    color: Color
    corner: Point  # upper left of the neighborhood in the picture
    mask: np.ndarray  # bool [h, w] of the neighborhood, with at least one pixel

    @classmethod
    def cut_out(cls, mask: np.ndarray, text: str, color: Color, *, margin: int, scale: int) -> Instance:
        """Keep the tight box of bool [H, W], widened by a margin as far as the picture goes and enlarged by `scale`."""
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        top, left = max(0, int(rows[0]) - margin), max(0, int(columns[0]) - margin)
        window = mask[top : int(rows[-1]) + 1 + margin, left : int(columns[-1]) + 1 + margin]
        return cls(text, color, (scale * left, scale * top), window.repeat(scale, axis=0).repeat(scale, axis=1))

    @property
    def area(self) -> int:
        """Pixels of the mask."""
        return int(self.mask.sum())

    def region(self, plane: np.ndarray) -> np.ndarray:
        """View of a plane [H, W, ...] at the neighborhood."""
        (left, top), (height, width) = self.corner, self.mask.shape
        return plane[top : top + height, left : left + width]

    def top(self) -> Point:
        """The pixel in the middle of the top row of the mask."""
        row = int(self.mask.any(1).argmax())
        columns = np.flatnonzero(self.mask[row])
        return self.corner[0] + int(columns[len(columns) // 2]), self.corner[1] + row


def draw_instances(
    image: str | Path | Image.Image | np.ndarray | Tensor,
    result: Mapping[str, Any],
    class_names: Sequence[str],
    *,
    score_threshold: float = 0.3,
    scale: int = 1,
) -> Image.Image:
    """Draw instances on a copy of an image.

    Large instances are drawn first, so that small ones in front stay visible. Colors follow the order in the result.

    Args:
        image: path, PIL image, array [H, W, 3] or tensor [3, H, W], as `SOLOv2.predict` takes them.
        result: `labels` int64 [N] and `masks`, bool or uint8 [N, H, W] or a list of N RLE dicts; `scores` float32 [N]
            where there are any. Without scores (ground truth) all instances are drawn, labeled with their class alone.
        class_names: name of each label.
        score_threshold: leave out instances below this score.
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
    picture = Image.fromarray(_paint(np.array(picture), instances, width))
    _draw_labels(picture, instances)
    return picture


def instance_color(index: int) -> Color:
    """RGB color of the instance of this rank; neighbors in rank are far apart in hue, the list never ends."""
    hue = (0.58 + index * 0.618034) % 1.0  # steps of the golden section never come close to an earlier hue for long
    saturation, value = ((0.85, 1.0), (0.6, 1.0), (0.95, 0.8))[index // 5 % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def contact_sheet(rows: Sequence[tuple[Image.Image, Image.Image]]) -> Image.Image:
    """Pairs of pictures, ground truth and predictions, as the rows of one sheet.

    Raises:
        InputError: no rows.
    """
    if not rows:
        raise InputError("a contact sheet needs at least one pair of pictures")
    gap, top = CELL // 70, CELL // 16
    fitted = [(_fit(left), _fit(right)) for left, right in rows]
    heights = [max(left.height, right.height) for left, right in fitted]
    sheet = Image.new("RGB", (2 * CELL + 3 * gap, top + sum(heights) + gap * len(rows)), PAPER)
    _draw_titles(sheet, (gap + CELL / 2, 2 * gap + 1.5 * CELL), top)
    y = top
    for pair, height in zip(fitted, heights, strict=True):
        for column, picture in enumerate(pair):
            x = gap + column * (CELL + gap) + (CELL - picture.width) // 2
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
    """One mask as bool [H, W]."""
    array = np.asarray(torch.as_tensor(decode_rle(dict(mask)) if isinstance(mask, Mapping) else mask).cpu()) > 0
    if array.shape != size:
        raise InputError(f"masks of {array.shape} (height, width) do not fit an image of {size}")
    return array


def _paint(photo: np.ndarray, instances: Sequence[Instance], width: int) -> np.ndarray:
    """Fill and outline masks on a copy of uint8 [H, W, 3], the largest first, with lines of `width` pixels.

    Each fill starts from the photograph, not from the fills below: mixed colors would belong to no instance.
    """
    pixels = photo.copy()
    order = sorted(instances, key=lambda instance: -instance.area)
    for instance in order:
        inside = instance.mask
        fill = (1 - FILL) * instance.region(photo)[inside] + FILL * np.asarray(instance.color, np.float32)
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
    """bool [h, w] grown by some pixels in all eight directions."""
    plane = torch.from_numpy(mask).float()[None]
    for kernel in ((2 * pixels + 1, 1), (1, 2 * pixels + 1)):
        plane = F.max_pool2d(plane, kernel, stride=1, padding=(kernel[0] // 2, kernel[1] // 2))
    return plane[0].bool().numpy()


def _draw_labels(picture: Image.Image, instances: Sequence[Instance]) -> None:
    """One label per instance, above its mask as long as no earlier label is there."""
    font_size = max(11, round(min(picture.size) / (30 if len(instances) <= 12 else 40)))  # a crowd leaves less room
    font = ImageFont.load_default(size=font_size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # what a size asks for
    pad = max(2, font_size // 5)
    height = sum(font.getmetrics()) + pad
    draw, taken = ImageDraw.Draw(picture), np.zeros((0, 4))
    for instance in instances:
        size = (math.ceil(font.getlength(instance.text)) + 2 * pad, height)
        x0, y0, x1, y1 = place = _label_place(size, instance.top(), taken, picture.size)
        taken = np.vstack([taken, place])
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=instance.color)
        draw.text((x0 + pad, y0 + pad // 2), instance.text, fill=_ink_on(instance.color), font=font)


def _label_place(size: Point, top: Point, taken: np.ndarray, bounds: Point) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of a label of `size` over the point `top`, the nearest height at which it covers none of `taken`
    ([K, 4], the same), inside a picture of `bounds`, as far as there is room.
    """
    (width, height), (right, bottom) = size, bounds
    x = max(0, min(top[0] - width // 2, right - width))
    heights = [max(0, min(top[1] - height + step, bottom - height)) for step in range(-bottom, bottom, height // 2)]
    columns = taken[(taken[:, 0] < x + width) & (taken[:, 2] > x)]
    free = [y for y in heights if not ((columns[:, 1] < y + height) & (columns[:, 3] > y)).any()]
    y = min(free or heights, key=lambda y: abs(y - (top[1] - height)))
    return x, y, x + width, y + height


def _ink_on(color: Color) -> Color:
    """Black or white, whichever contrasts more with the color (WCAG relative luminance)."""
    red, green, blue = ((channel / 255) ** 2.2 for channel in color)
    return (0, 0, 0) if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else (255, 255, 255)


def _fit(picture: Image.Image) -> Image.Image:
    factor = CELL / max(picture.size)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _draw_titles(sheet: Image.Image, centers: tuple[float, float], height: int) -> None:
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=round(0.6 * height))
    for title, x in zip(TITLES, centers, strict=True):
        draw.text((x, height / 2), title, fill=INK, font=font, anchor="mm")
