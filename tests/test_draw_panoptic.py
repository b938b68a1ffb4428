"""Panoptic pictures: stuff is tinted, void does not change, things look as instances do, names stay inside."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from solov2.errors import InputError
from solov2.visualize import draw_instances
from solov2.visualize_panoptic import STUFF_FILL, draw_panoptic, stuff_color

HEIGHT, WIDTH = 300, 400
NAMES = SimpleNamespace(class_names=["cat", "dog"], stuff_names=["grass", "sky"])
GRAY = Image.new("RGB", (WIDTH, HEIGHT), (120, 120, 120))


def result_of(*segments: tuple[bool, int, tuple[int, int, int, int]]) -> dict[str, Any]:
    """Rectangular segments (is_thing, label, box), later ones on top; none may hide a side of another."""
    ids, found = np.zeros((HEIGHT, WIDTH), dtype=np.int32), []
    for number, (is_thing, label, box) in enumerate(segments, 1):
        ids[box[1] : box[3], box[0] : box[2]] = number
        found.append(
            {"id": number, "label": label, "is_thing": is_thing, "box": box, "score": 0.8 if is_thing else None}
        )
    return {"panoptic_map": torch.from_numpy(ids), "segments": found}


def test_stuff_is_tinted_named_inside_and_void_does_not_change() -> None:
    result = result_of((False, 0, (0, 0, 400, 140)), (False, 1, (0, 200, 8, 300)))
    pixels = np.array(draw_panoptic(GRAY, result, NAMES)).astype(int)
    flat = [(1 - STUFF_FILL) * 120 + STUFF_FILL * np.array(stuff_color(label)) for label in (0, 1)]
    differs = np.abs(pixels[:140] - flat[0]).max(2) > 1
    rows, columns = np.nonzero(differs)  # the name, around the center
    assert 50 < len(rows) < 3000 and abs(rows.mean() - 70) < 8 and abs(columns.mean() - 200) < 8
    assert (np.abs(pixels[200:, :8] - flat[1]) <= 1).all()  # no room for a name
    assert (pixels[140:200] == 120).all() and (pixels[200:, 8:] == 120).all()
    assert GRAY.getextrema() == ((120, 120),) * 3


def test_things_are_drawn_as_instances_are() -> None:
    result = result_of((True, 1, (50, 60, 200, 190)), (True, 0, (220, 100, 390, 280)))
    masks = torch.stack([result["panoptic_map"] == number for number in (1, 2)])
    instances = {"labels": torch.tensor([1, 0]), "masks": masks, "scores": torch.tensor([0.8, 0.8])}
    for scale in (1, 2):
        expected = draw_instances(GRAY, instances, NAMES.class_names, scale=scale)
        assert draw_panoptic(GRAY, result, NAMES, scale=scale).tobytes() == expected.tobytes()


def test_names_of_stuff_keep_away_from_labels() -> None:
    result = result_of((False, 0, (0, 0, 400, 300)), (True, 0, (150, 160, 250, 250)))
    only_thing = {**result, "segments": result["segments"][1:]}
    both, thing = (np.array(draw_panoptic(GRAY, each, NAMES)).astype(int) for each in (result, only_thing))
    label = (thing == np.array([thing[155, 200]])).all(2)  # its background, above the cat
    label[:100] = label[170:] = False
    assert label.sum() > 100 and (both[label] == thing[label]).all()


def test_nothing_and_wrong_sizes() -> None:
    assert draw_panoptic(GRAY, result_of(), NAMES).tobytes() == GRAY.tobytes()
    with pytest.raises(InputError, match="size"):
        draw_panoptic(GRAY, {**result_of(), "panoptic_map": torch.zeros(4, 4, dtype=torch.int32)}, NAMES)
    with pytest.raises(InputError, match="label 7"):
        draw_panoptic(GRAY, result_of((False, 7, (0, 0, 50, 50))), NAMES)
