"""Outlines: of common shapes, of masks, and of several parts as one polygon.

COCO's rasterizer fills by the even-odd rule, and a line that is walked there and back changes nothing. So outlines of
parts and of holes that are joined by bridges become one polygon with exactly the same pixels.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from solov2.formats.annotated import Polygons, Segmentation, compressed
from solov2.ops.masks import draw_window, run_lengths

CIRCLE_POINTS = 64
MAX_DISTANCES = 2**22  # between the points of two outlines that are compared at once


def rectangle(x1: float, y1: float, x2: float, y2: float) -> list[float]:
    """The outline of a rectangle with these corners."""
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def ellipse(x: float, y: float, radius_x: float, radius_y: float, rotation: float = 0.0) -> list[float]:
    """The outline of an ellipse around x, y, as 64 points; `rotation` clockwise in radians.

    The points lie a little outside, so that the area is that of the ellipse.
    """
    angles = np.arange(CIRCLE_POINTS) * 2 * math.pi / CIRCLE_POINTS
    grow = math.sqrt(2 * math.pi / CIRCLE_POINTS / math.sin(2 * math.pi / CIRCLE_POINTS))
    points = np.stack((x + radius_x * grow * np.cos(angles), y + radius_y * grow * np.sin(angles)), axis=1)
    return turned(points.ravel().tolist(), x, y, rotation)


def turned(polygon: list[float], x: float, y: float, rotation: float) -> list[float]:
    """An outline turned around x, y by `rotation`, clockwise in radians."""
    if rotation == 0:
        return polygon
    cosine, sine = math.cos(rotation), math.sin(rotation)
    points = (np.array(polygon).reshape(-1, 2) - (x, y)) @ np.array([[cosine, sine], [-sine, cosine]]) + (x, y)
    return points.ravel().tolist()


def trace(segmentation: Segmentation, size: tuple[int, int]) -> tuple[Polygons, Polygons]:
    """The outlines of the mask of a segmentation of an image of `size` (h, w), along the borders of its pixels.

    Returns:
        The outlines of its parts, which are connected by sides of pixels, and those of its holes.
    """
    [lengths] = run_lengths([segmentation], size)
    window, (left, top, _, _) = draw_window(lengths, size[0])
    padded = np.pad(window.T.astype(np.int8), 1)  # [rows, columns]
    horizontal, vertical = _steps(np.diff(padded, axis=0)[:, 1:-1]), _steps(np.diff(padded, axis=1)[1:-1].T)
    # With the mask on the right: along upper borders to the right, along left borders up.
    ways: list[dict[tuple[int, int], list[tuple[int, int]]]] = [defaultdict(list), defaultdict(list)]
    for y, start, end, inside_below in horizontal:
        ways[0][(start, y) if inside_below else (end, y)].append((end, y) if inside_below else (start, y))
    for x, start, end, inside_right in vertical:
        ways[1][(x, end) if inside_right else (x, start)].append((x, start) if inside_right else (x, end))
    parts: Polygons = []
    holes: Polygons = []
    while ways[0]:
        loop = _walk(ways)
        points = np.array(loop, dtype=np.float64) + (left, top)
        (parts if _doubled_area(loop) > 0 else holes).append(points.ravel().tolist())
    return parts, holes


def _steps(changes: np.ndarray) -> list[tuple[int, int, int, bool]]:
    """Runs of equal changes within the rows of [n, length]: (row, start, end, whether the change is 1)."""
    padded = np.pad(changes, ((0, 0), (1, 1)))
    rows, columns = np.nonzero(np.diff(padded, axis=1))
    found = []
    previous: tuple[int, int] | None = None
    for row, column in zip(rows.tolist(), columns.tolist()):
        if previous is not None and previous[0] == row and changes[row, column - 1]:
            found.append((row, previous[1], column, bool(changes[row, column - 1] > 0)))
        previous = (row, column)
    return found


def _walk(ways: list[dict[tuple[int, int], list[tuple[int, int]]]]) -> list[tuple[int, int]]:
    """Take one closed loop out of the ways along the borders, horizontal ones and vertical ones in turn."""
    start = next(iter(ways[0]))
    loop, place, axis, direction = [start], start, 0, 1
    while True:
        ends = ways[axis][place]
        # Where two pixels touch at a corner, turning right keeps them apart.
        wanted = direction if axis else -direction
        turn = 0
        if len(ends) > 1 and len(loop) > 1:
            turn = next(i for i, end in enumerate(ends) if (end[axis] - place[axis]) * wanted > 0)
        end = ends.pop(turn)
        if not ends:
            del ways[axis][place]
        direction = 1 if end[axis] > place[axis] else -1
        place, axis = end, 1 - axis
        if place == start and axis == 0:
            return loop
        loop.append(place)


def _doubled_area(loop: Sequence[tuple[int, int]]) -> int:
    """Twice the area inside a loop; negative if it runs counterclockwise in the image."""
    x, y = np.array(loop, dtype=np.int64).T
    return int(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))


def join(polygons: Sequence[Sequence[float]]) -> list[float]:
    """One closed polygon through all outlines, with bridges between the closest points, walked there and back."""
    joined = np.asarray(polygons[0], dtype=np.float64).reshape(-1, 2)
    for polygon in polygons[1:]:
        points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
        here, there = _closest(joined, points)
        loop = np.concatenate((points[there:], points[: there + 1]))
        joined = np.concatenate((joined[: here + 1], loop, joined[here:]))
    return joined.ravel().tolist()


def _closest(first: np.ndarray, second: np.ndarray) -> tuple[int, int]:
    """The places of two points of [n, 2] and [m, 2] that are closest to each other."""
    step = max(1, MAX_DISTANCES // len(first))
    best = (math.inf, 0, 0)
    for begin in range(0, len(second), step):
        distances = ((first[:, None] - second[None, begin : begin + step]) ** 2).sum(-1)
        here, there = np.unravel_index(distances.argmin(), distances.shape)
        best = min(best, (float(distances[here, there]), int(here), begin + int(there)))
    return best[1], best[2]


def as_polygons(segmentation: Segmentation, size: tuple[int, int]) -> tuple[Polygons, bool]:
    """The parts of a segmentation as polygons with the same pixels, and whether its mask has holes that are bridged."""
    if isinstance(segmentation, list):
        return segmentation, False
    parts, holes = trace(segmentation, size)
    return ([join([*parts, *holes])] if holes else parts), bool(holes)


def as_one_polygon(segmentation: Segmentation, size: tuple[int, int]) -> tuple[list[float], int, bool]:
    """One polygon with the pixels of a segmentation, the number of parts joined in it, and whether it has holes."""
    parts, holes = as_polygons(segmentation, size)
    if len(parts) == 1:
        return parts[0], 1, holes
    joined = join(parts)
    if not same_mask([joined], segmentation, size):  # parts overlap, which the even-odd rule would cut out
        outlines, inner = trace(segmentation, size)
        joined, holes = join([*outlines, *inner]), bool(inner)
    return joined, len(parts), holes


def same_mask(first: Segmentation, second: Segmentation, size: tuple[int, int]) -> bool:
    """Whether two segmentations have the same pixels in an image of `size` (h, w)."""
    one, other = compressed(first, size), compressed(second, size)
    return bool(one["counts"] == other["counts"])
