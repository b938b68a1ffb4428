"""Draw panoptic results: things like instances, stuff in flat colors with its name inside, void unchanged."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from solov2.errors import InputError
from solov2.ops.fonts import find_fonts, load_font
from solov2.ops.images import to_rgb_tensor
from solov2.visualize import BAND, Color, Instance, draw_labels, instance_color, label_text, paint

STUFF_FILL = 0.55  # opacity of the color of stuff, which is paler than those of instances


class PanopticNames(Protocol):
    """What has the names of the labels, such as a model."""

    class_names: list[str]
    stuff_names: list[str]


def draw_panoptic(
    image: str | Path | Image.Image | np.ndarray | Tensor,
    result: Mapping[str, Any],
    model: PanopticNames,
    *,
    scale: int = 1,
    colors: Sequence[Color] | None = None,
) -> Image.Image:
    """Draw the segments of a panoptic result on a copy of an image.

    Things are drawn as by `draw_instances`. Stuff gets a flat, translucent color, the same for a class in every
    picture, and its name where there is room. Pixels of no segment (void) are not changed.

    Args:
        image: as for `draw_instances`.
        result: `panoptic_map` int32 [H, W] and `segments`, as from `SOLOv2.predict_panoptic`.
        model: has the names of the labels, `class_names` and `stuff_names`.
        scale: integer factor by which image and map are enlarged first.
        colors: (red, green, blue), 0 to 255, of each thing; default: `instance_color` of the index among the things.

    Returns:
        RGB image; its size is that of the input times `scale`.

    Raises:
        InputError: the image cannot be read, the map does not have its size, or a label has no name.
        TypeError: `image` has an unsupported type.
    """
    picture = Image.fromarray(to_rgb_tensor(image).permute(1, 2, 0).cpu().numpy())
    ids = torch.as_tensor(result["panoptic_map"]).cpu().numpy()
    if ids.shape != (picture.height, picture.width):
        size = (picture.height, picture.width)
        raise InputError(f"the panoptic map has size {ids.shape} (height, width) but the image has {size}")
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)
    fonts = find_fonts((*model.class_names, *model.stuff_names))
    things: list[Instance] = []
    stuff: list[tuple[int, str, Path | None]] = []
    tints: dict[int, Color] = {}  # of the ids of stuff
    for segment in result["segments"]:
        names = model.class_names if segment["is_thing"] else model.stuff_names
        text, name = label_text(segment["label"], segment.get("score"), names)
        if segment["is_thing"]:
            color = instance_color(len(things)) if colors is None else colors[len(things)]
            things.append(Instance.of_segment(ids, segment, text, fonts[name], color, scale))
        else:
            tints[segment["id"]] = stuff_color(segment["label"])
            stuff.append((segment["id"], text, fonts[name]))
    _tint(picture, ids, tints, scale)
    picture = paint(picture, things, max(1, round(min(picture.size) / 240)))
    taken = draw_labels(picture, things)
    _draw_stuff_names(picture, ids, stuff, taken, scale)
    return picture


def stuff_color(label: int) -> Color:
    """RGB color (0 to 255) of a stuff label: paler than those of instances."""
    red, green, blue = colorsys.hsv_to_rgb((0.25 + label * 0.618034) % 1.0, 0.5, (0.9, 0.65)[label // 5 % 2])
    return round(255 * red), round(255 * green), round(255 * blue)


def _tint(picture: Image.Image, ids: np.ndarray, colors: Mapping[int, Color], scale: int) -> None:
    """Blend a picture with a color in the segments that have one, a band of rows at a time."""
    table = np.zeros((int(ids.max(initial=0)) + 1, 3), dtype=np.float32)
    tinted = np.zeros(len(table), dtype=bool)
    for number, color in colors.items():
        table[number], tinted[number] = color, True
    for start in range(0, len(ids), BAND):
        band = ids[start : start + BAND].repeat(scale, axis=0).repeat(scale, axis=1)
        box = (0, scale * start, picture.width, scale * start + len(band))
        pixels, where = np.array(picture.crop(box)), tinted[band]
        pixels[where] = (1 - STUFF_FILL) * pixels[where] + STUFF_FILL * table[band[where]]
        picture.paste(Image.fromarray(pixels), box)


def _draw_stuff_names(
    picture: Image.Image,
    ids: np.ndarray,
    stuff: Sequence[tuple[int, str, Path | None]],
    taken: np.ndarray,
    scale: int,
) -> None:
    """Write the name of each (id, text, font) inside its segment, as near to its center as it fits beside labels."""
    font_size = max(11, round(min(picture.size) / 34))
    draw, step = ImageDraw.Draw(picture), max(1, min(ids.shape) // 128)  # cells of step x step pixels of the image
    cells = ids[::step, ::step].copy()
    for x0, y0, x1, y1 in (taken / (scale * step)).tolist():
        cells[math.floor(y0) : math.ceil(y1), math.floor(x0) : math.ceil(x1)] = 0
    for number, text, path in stuff:
        font = load_font(path, font_size)
        size = (math.ceil(font.getlength(text)) + font_size // 2, sum(font.getmetrics()) + 2)
        width, height = (math.ceil(side / (scale * step)) + 1 for side in size)
        inside = cells == number
        sums = np.pad(inside, ((1, 0), (1, 0))).cumsum(0).cumsum(1)  # of the cells above and to the left
        if height >= len(sums) or width >= sums.shape[1]:
            continue
        counts = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
        rows, columns = np.nonzero(counts == width * height)
        if len(rows):
            center = [where.mean() for where in np.nonzero(inside)]
            best = np.hypot(rows + height / 2 - center[0], columns + width / 2 - center[1]).argmin()
            middle = (columns[best] + width / 2) * scale * step, (rows[best] + height / 2) * scale * step
            outline = max(1, font_size // 9)
            draw.text(middle, text, "white", font, anchor="mm", stroke_width=outline, stroke_fill=(40, 40, 40))
