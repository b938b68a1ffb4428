"""Draw instances: translucent masks, outlines, and labels that stay readable on cluttered images."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from solov2.errors import InputError
from solov2.ops.fonts import drawable, find_fonts, load_font
from solov2.ops.images import to_rgb_tensor
from solov2.ops.masks import check_segmentation, draw_window, masks_to_boxes, run_lengths

Point = tuple[int, int]  # x, y in pixels
Color = tuple[int, int, int]
Mask = Tensor | np.ndarray | Mapping[str, Any]  # bool or uint8 [H, W], or an RLE

SHEET_BACKGROUND = (250, 250, 250)
SHEET_TEXT = (30, 30, 30)
CELL = 560  # side in pixels of the square that a picture on a contact sheet is fitted into
FILL = 0.45  # opacity of the color inside a mask
BAND = 256  # rows of a mask that are painted together; few, so that they stay in the processor's cache


@dataclass(frozen=True)
class Instance:
    """One instance to draw, with at least one pixel. An RLE stays one: 100 planes of a photograph can take 1 GB."""

    text: str
    font: Path | None  # of the text, as from `find_fonts`
    color: Color
    mask: Mask  # an RLE of the image, or a plane that is cropped to the tight box
    corner: Point  # upper left corner of the tight box in the picture
    top: Point  # the middle pixel in the top row of the mask
    area: int  # in pixels of the picture
    scale: int  # integer factor from the image to the picture

    @classmethod
    def measure(cls, mask: Mask, text: str, font: Path | None, color: Color, scale: int) -> Instance | None:
        """The instance of a mask of the whole image; None if no pixel is set."""
        window, corner = _crop(mask)
        if not window.size:
            return None
        if not isinstance(mask, Mapping):
            mask = mask[corner[1] : corner[1] + window.shape[0], corner[0] : corner[0] + window.shape[1]]
        return cls._of_window(window, corner, mask, text, font, color, scale)

    @classmethod
    def _of_window(
        cls, window: np.ndarray, corner: Point, mask: Mask, text: str, font: Path | None, color: Color, scale: int
    ) -> Instance:
        """The instance of a mask in its tight box, bool [h, w], at `corner` in the image."""
        left, top = corner
        columns = (scale * np.flatnonzero(window[0])[:, None] + np.arange(scale)).ravel()
        middle = scale * left + int(columns[len(columns) // 2])
        area = scale * scale * int(np.count_nonzero(window))
        return cls(text, font, color, mask, (scale * left, scale * top), (middle, scale * top), area, scale)

    @classmethod
    def of_segment(
        cls, ids: np.ndarray, segment: Mapping[str, Any], text: str, font: Path | None, color: Color, scale: int
    ) -> Instance:
        """The instance of a segment of a panoptic map, int32 [H, W]."""
        left, top, right, bottom = segment["box"]
        window = ids[top:bottom, left:right] == segment["id"]
        return cls._of_window(window, (left, top), window, text, font, color, scale)

    def window(self) -> np.ndarray:
        """The mask in its tight box in the picture, bool [h, w]."""
        mask, _ = _crop(self.mask)
        return mask if self.scale == 1 else mask.repeat(self.scale, axis=0).repeat(self.scale, axis=1)


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
        scale: integer factor by which image and masks are enlarged first, so that labels do not hide a small image.
        colors: (red, green, blue), 0 to 255, of each of the N instances; default: `instance_color` of the index among
            the drawn instances.

    Returns:
        RGB image; its size is that of the input times `scale`.

    Raises:
        InputError: the image cannot be read, the masks do not have its size, or a label has no name.
        TypeError: `image` has an unsupported type.
    """
    picture = Image.fromarray(to_rgb_tensor(image).permute(1, 2, 0).cpu().numpy())
    size = (picture.height, picture.width)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)
    labels, scores = torch.as_tensor(result["labels"]).tolist(), _scores(result)
    kept = [index for index in range(len(labels)) if scores is None or scores[index] >= score_threshold]
    width = max(1, round(min(picture.size) / 240))
    fonts, instances = find_fonts(tuple(class_names)), []
    for rank, index in enumerate(kept):
        text, name = label_text(labels[index], None if scores is None else scores[index], class_names)
        color = instance_color(rank) if colors is None else colors[index]
        mask = result["masks"][index]
        mask_size = tuple(mask["size"] if isinstance(mask, Mapping) else mask.shape)
        if mask_size != size:
            raise InputError(f"the masks have size {mask_size} (height, width) but the image has {size}")
        # A final mask may be empty, which leaves nothing to label.
        if instance := Instance.measure(mask, text, fonts[name], color, scale):
            instances.append(instance)
    picture = paint(picture, instances, width)
    draw_labels(picture, instances)
    return picture


def instance_color(index: int) -> Color:
    """RGB color (0 to 255) for any index >= 0; successive indices differ strongly in hue."""
    hue = (0.58 + index * 0.618034) % 1.0  # golden-ratio steps spread the hues evenly
    saturation, value = ((0.85, 1.0), (0.6, 1.0), (0.95, 0.8))[index // 5 % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def contact_sheet(
    rows: Iterable[tuple[Image.Image, Image.Image]], titles: tuple[str, str] = ("ground truth", "predictions")
) -> Image.Image:
    """Arrange pairs of pictures as the rows of one sheet, with a title above each column.

    Raises:
        InputError: `rows` is empty.
    """
    fitted = [(_fit(left), _fit(right)) for left, right in rows]  # only one pair exists at its full size
    if not fitted:
        raise InputError("a contact sheet needs at least one pair of pictures")
    gap, top = CELL // 70, CELL // 16
    heights = [max(left.height, right.height) for left, right in fitted]
    sheet = Image.new("RGB", (2 * CELL + 3 * gap, top + sum(heights) + gap * len(fitted)), SHEET_BACKGROUND)
    _draw_titles(sheet, titles, (gap + CELL / 2, 2 * gap + 1.5 * CELL), top)
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


def label_text(label: int, score: float | None, class_names: Sequence[str]) -> tuple[str, str]:
    """The text to draw for a label, and its class name.

    Raises:
        InputError: the label has no name.
    """
    if not 0 <= label < len(class_names):
        raise InputError(f"label {label} has no name: class_names has length {len(class_names)}")
    name = class_names[label]
    return drawable(name) if score is None else f"{drawable(name)} {score:.2f}", name


def _crop(mask: Mask) -> tuple[np.ndarray, Point]:
    """(mask in its tight box, bool [h, w]; upper left corner of the box); [0, 0] if no pixel is set."""
    if isinstance(mask, Mapping):
        rle, size = dict(mask), (int(mask["size"][0]), int(mask["size"][1]))
        check_segmentation(rle, size)
        window, (left, top, _, _) = draw_window(run_lengths([rle], size)[0], size[0])
        return window.T.view(bool), (left, top)
    plane = torch.as_tensor(mask)
    plane = plane if plane.dtype == torch.bool else plane > 0
    left, top, right, bottom = masks_to_boxes(plane[None])[0].int().tolist()
    return plane[top:bottom, left:right].cpu().numpy(), (left, top)


def paint(picture: Image.Image, instances: Sequence[Instance], width: int) -> Image.Image:
    """Fill and outline masks on a copy of an RGB picture, the largest first, with lines of `width` pixels.

    Each fill blends with the original picture, not with fills below it: a mix of two colors would belong to no
    instance.
    """
    painted, margin = picture.copy(), width + 1
    order = sorted(instances, key=lambda instance: -instance.area)
    levels = np.arange(256, dtype=np.uint8)[:, None]  # each value that a channel can have
    for instance in order:
        filled = (1 - FILL) * levels + FILL * np.asarray(instance.color, np.float32)
        for inside, (x, y), _ in _bands(instance.window(), halo=0):
            _blend(painted, picture, filled, inside, (instance.corner[0] + x, instance.corner[1] + y))
    for instance in order:
        color = np.asarray(instance.color, np.float32)
        # The dark rim around the bright line makes the outline visible on light and on dark backgrounds.
        rim_levels, line_levels = 0.4 * levels + 0.15 * color, 0 * levels + (0.7 * color + 0.3 * 255)
        plane, (left, top) = _with_margin(instance, margin, picture.size)
        for inside, (x, y), rows in _bands(plane, halo=margin):
            corner = left + x, top + y + rows.start
            rim = _grow(inside, max(1, width // 2)) & ~inside
            line = inside & _grow(~inside, width)
            _blend(painted, painted, rim_levels, rim[rows], corner)
            _blend(painted, painted, line_levels, line[rows], corner)
    return painted


def _with_margin(instance: Instance, margin: int, bounds: Point) -> tuple[np.ndarray, Point]:
    """The window of an instance with a margin, in pixels, inside a picture of (width, height); x, y of its corner."""
    window, (left, top) = instance.window(), instance.corner
    height, width = window.shape
    before = min(margin, top), min(margin, left)
    after = min(margin, bounds[1] - top - height), min(margin, bounds[0] - left - width)
    return np.pad(window, tuple(zip(before, after))), (left - before[1], top - before[0])


def _bands(mask: np.ndarray, halo: int) -> Iterator[tuple[np.ndarray, Point, slice]]:
    """Bands of BAND rows of a mask, bool [h, w], without the columns beside its pixels: empty parts cost nothing.

    Yields:
        (the band with `halo` more pixels on each side that has them; x, y of its corner in the mask; the rows of it
        that are not halo).
    """
    for start in range(0, len(mask), BAND):
        top = max(0, start - halo)
        rows = mask[top : start + BAND + halo]
        used = np.flatnonzero(rows.any(0))
        if len(used):
            left = max(0, int(used[0]) - halo)
            yield rows[:, left : int(used[-1]) + 1 + halo], (left, top), slice(start - top, start - top + BAND)


def _blend(target: Image.Image, source: Image.Image, levels: np.ndarray, where: np.ndarray, corner: Point) -> None:
    """Where `where`, bool [h, w] at `corner`, is set, write new values for the source's pixels to the target.

    `levels`, float [256, 3], holds the new value of each value of each channel; fractions are cut off.
    """
    box = (*corner, corner[0] + where.shape[1], corner[1] + where.shape[0])
    mapped = source.crop(box).point(levels.astype(np.uint8).T.ravel().tolist())
    target.paste(mapped, box, Image.fromarray(where))


def _grow(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Dilate a mask, bool [h, w], by `pixels` in all eight directions."""
    for _ in range(2):  # down the columns; then, transposed, along the rows
        reach, covered = np.pad(mask, ((pixels, pixels), (0, 0))), 1
        while covered < 2 * pixels + 1:  # each entry is the union of `covered` pixels
            step = min(covered, 2 * pixels + 1 - covered)
            reach, covered = reach[:-step] | reach[step:], covered + step
        mask = reach.T
    return mask


def draw_labels(picture: Image.Image, instances: Sequence[Instance]) -> np.ndarray:
    """Draw one label per instance, above its mask unless that would cover an earlier label.

    Returns:
        the boxes of the labels, float64 [K, 4].
    """
    font_size = max(11, round(min(picture.size) / (30 if len(instances) <= 12 else 40)))  # less room if there are many
    pad = max(2, font_size // 5)
    fonts = {path: load_font(path, font_size) for path in {instance.font for instance in instances}}
    draw, taken = ImageDraw.Draw(picture), np.zeros((0, 4))
    for instance in instances:
        font = fonts[instance.font]
        size = (math.ceil(font.getlength(instance.text)) + 2 * pad, sum(font.getmetrics()) + pad)
        x0, y0, x1, y1 = place = _label_place(size, instance.top, taken, picture.size)
        taken = np.vstack([taken, place])
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=instance.color)
        draw.text((x0 + pad, y0 + pad // 2), instance.text, fill=_ink_on(instance.color), font=font)
    return taken


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


def _draw_titles(sheet: Image.Image, titles: tuple[str, str], centers: tuple[float, float], height: int) -> None:
    draw, font = ImageDraw.Draw(sheet), load_font(None, round(0.6 * height))
    for title, x in zip(titles, centers, strict=True):
        draw.text((x, height / 2), title, fill=SHEET_TEXT, font=font, anchor="mm")
