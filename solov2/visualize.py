"""Draw instances: translucent masks, outlines, and labels that stay readable on cluttered images."""

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

SHEET_BACKGROUND = (250, 250, 250)
SHEET_TEXT = (30, 30, 30)
CELL = 560  # side in pixels of the square that a picture on a contact sheet is fitted into
TITLES = ("ground truth", "predictions")
FILL = 0.45  # opacity of the color inside a mask


@dataclass(frozen=True)
class Instance:
    """One instance to draw. The mask is cropped, because 100 full-size masks of a large image need too much memory."""

    text: str
    color: Color
    corner: Point  # upper left corner of the crop in the picture
    mask: np.ndarray  # cropped, bool [h, w], with at least one pixel set

    @classmethod
    def crop(cls, mask: np.ndarray, text: str, color: Color, *, margin: int, scale: int) -> Instance:
        """Crop a mask, bool [H, W], to its tight box plus a margin in pixels, and enlarge it by an integer `scale`."""
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        top, left = max(0, int(rows[0]) - margin), max(0, int(columns[0]) - margin)
        window = mask[top : int(rows[-1]) + 1 + margin, left : int(columns[-1]) + 1 + margin]
        return cls(text, color, (scale * left, scale * top), window.repeat(scale, axis=0).repeat(scale, axis=1))

    @property
    def area(self) -> int:
        """Number of pixels of the mask."""
        return int(self.mask.sum())

    def region(self, plane: np.ndarray) -> np.ndarray:
        """View of the crop in an array [H, W, ...]."""
        (left, top), (height, width) = self.corner, self.mask.shape
        return plane[top : top + height, left : left + width]

    def top(self) -> Point:
        """The middle pixel in the top row of the mask."""
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
    colors: Sequence[Color] | None = None,
) -> Image.Image:
    """Draw instances on a copy of an image.

    Large instances are drawn first, so that small ones in front stay visible.

    Args:
        image: path, PIL image, array uint8 [H, W, 3] or tensor uint8 [3, H, W], as for `SOLOv2.predict`.
        result: `labels` int64 [N]; `masks` bool or uint8 [N, H, W], or a list of N RLE dicts; optional `scores`
            float32 [N]. Without scores (ground truth) all instances are drawn, labeled with their class only.
        class_names: name of each label.
        score_threshold: minimum score of the instances that are drawn.
        scale: integer factor by which image and masks are enlarged first; on a small image labels would hide it.
        colors: (red, green, blue), 0 to 255, of each of the N instances; default: `instance_color` of the index among
            the drawn instances.

    Returns:
        RGB image; its size is that of the input times `scale`.

    Raises:
        InputError: the masks do not have the size of the image, or a label has no name.
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
        if mask.any():  # a final mask may be empty, which leaves nothing to label
            color = instance_color(rank) if colors is None else colors[index]
            instances.append(Instance.crop(mask, text, color, margin=width + 1, scale=scale))
    picture = Image.fromarray(_paint(np.array(picture), instances, width))
    _draw_labels(picture, instances)
    return picture


def instance_color(index: int) -> Color:
    """RGB color (0 to 255) for any index >= 0; successive indices differ strongly in hue."""
    hue = (0.58 + index * 0.618034) % 1.0  # golden-ratio steps spread the hues evenly
    saturation, value = ((0.85, 1.0), (0.6, 1.0), (0.95, 0.8))[index // 5 % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def contact_sheet(rows: Sequence[tuple[Image.Image, Image.Image]]) -> Image.Image:
    """Arrange (ground truth, predictions) pairs of pictures as the rows of one sheet.

    Raises:
        InputError: `rows` is empty.
    """
    if not rows:
        raise InputError("a contact sheet needs at least one pair of pictures")
    gap, top = CELL // 70, CELL // 16
    fitted = [(_fit(left), _fit(right)) for left, right in rows]
    heights = [max(left.height, right.height) for left, right in fitted]
    sheet = Image.new("RGB", (2 * CELL + 3 * gap, top + sum(heights) + gap * len(rows)), SHEET_BACKGROUND)
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
        raise InputError(f"label {label} has no name: class_names has length {len(class_names)}")
    return class_names[label] if score is None else f"{class_names[label]} {score:.2f}"


def _mask_array(mask: Tensor | np.ndarray | Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    """One mask as bool [H, W]."""
    array = np.asarray(torch.as_tensor(decode_rle(dict(mask)) if isinstance(mask, Mapping) else mask).cpu()) > 0
    if array.shape != size:
        raise InputError(f"the masks have size {array.shape} (height, width) but the image has {size}")
    return array


def _paint(image: np.ndarray, instances: Sequence[Instance], width: int) -> np.ndarray:
    """Fill and outline masks on a copy of `image`, uint8 [H, W, 3], the largest first, with lines of `width` pixels.

    Each fill blends with the original image, not with fills below it: a mix of two colors would belong to no instance.
    """
    pixels = image.copy()
    order = sorted(instances, key=lambda instance: -instance.area)
    for instance in order:
        inside = instance.mask
        fill = (1 - FILL) * instance.region(image)[inside] + FILL * np.asarray(instance.color, np.float32)
        instance.region(pixels)[inside] = fill
    for instance in order:
        inside, region, color = instance.mask, instance.region(pixels), np.asarray(instance.color, np.float32)
        # The dark rim around the bright line makes the outline visible on light and on dark backgrounds.
        rim = _grow(inside, max(1, width // 2)) & ~inside
        line = inside & _grow(~inside, width)
        region[rim] = 0.4 * region[rim] + 0.15 * color
        region[line] = 0.7 * color + 0.3 * 255
    return pixels


def _grow(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Dilate a mask, bool [h, w], by `pixels` in all eight directions."""
    plane = torch.from_numpy(mask).float()[None]
    for kernel in ((2 * pixels + 1, 1), (1, 2 * pixels + 1)):
        plane = F.max_pool2d(plane, kernel, stride=1, padding=(kernel[0] // 2, kernel[1] // 2))
    return plane[0].bool().numpy()


def _draw_labels(picture: Image.Image, instances: Sequence[Instance]) -> None:
    """Draw one label per instance, above its mask unless that would cover an earlier label."""
    font_size = max(11, round(min(picture.size) / (30 if len(instances) <= 12 else 40)))  # less room if there are many
    font = ImageFont.load_default(size=font_size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # because a size is given
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
    """Box (x0, y0, x1, y1) of a label: directly above `top`, or at the nearest free height if there is one.

    Args:
        size: (width, height) of the label.
        top: (x, y) of the point.
        taken: boxes of the earlier labels, float64 [K, 4].
        bounds: (width, height) of the picture, which contains the box.
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
        draw.text((x, height / 2), title, fill=SHEET_TEXT, font=font, anchor="mm")
