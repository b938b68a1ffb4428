"""The generated panoptic dataset: its composition, its files, and that they are what was painted."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from solov2.data.generate import scene_generator
from solov2.data.panoptic import CocoPanoptic
from solov2.data.panoptic_file import PanopticFile, open_annotations
from solov2.data.panoptic_shapes import STUFF, draw_panoptic_scene, generate_panoptic_shapes
from solov2.data.shapes import CLASSES, generate_shapes
from solov2.errors import InputError
from solov2.ops.panoptic import measure_segments

SIZES = {"train_images": 4, "val_images": 100, "size": 192, "seed": 0}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "panoptic_shapes"
    assert generate_panoptic_shapes(root, **SIZES)
    return root


@pytest.fixture(scope="module")
def validation(root: Path) -> PanopticFile:
    return open_annotations(root / "annotations" / "panoptic_val2017.json")


def test_the_files_are_what_was_painted(root: Path, validation: PanopticFile) -> None:
    for index in (0, 6, 12, 49):  # with a void band, with a crowd, without objects
        pixels, ids, segments = draw_panoptic_scene(scene_generator(0, "val2017", index), 192, index)
        _, png, listed = validation[index + 1]
        assert np.array_equal(validation.read_map(index + 1), ids) and png == f"{index + 1:012d}.png"
        assert [(s.id, s.category_id, s.is_crowd, s.area, [*s.box]) for s in listed] == [
            (s["id"], s["category_id"], s["iscrowd"], s["area"], s["bbox"]) for s in segments
        ]
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, format="JPEG", quality=92)
        assert encoded.getvalue() == (root / "val2017" / f"{index + 1:012d}.jpg").read_bytes()
        other, _, _ = draw_panoptic_scene(scene_generator(1, "val2017", index), 192, index)
        assert (pixels != other).any()


def test_the_painted_regions_are_those_of_the_ids() -> None:
    """Without noise, in an image whose stuff is plain, colors change abruptly only where ids do."""
    found = 0
    for index in range(200):
        pixels, ids, segments = draw_panoptic_scene(scene_generator(3, "val2017", index), 96, index)
        stuff = [s["id"] for s in segments if s["category_id"] == STUFF["plain"]]
        steps = np.abs(np.diff(pixels.astype(int).sum(2), axis=1))
        for number in stuff:
            inside = (ids[:, 1:] == number) & (ids[:, :-1] == number)
            if inside.sum() > 200:
                found += 1
                assert steps[inside].mean() < 20  # noise of 6 gray levels in three channels; a pattern would give 40
    assert found > 50


def test_composition(validation: PanopticFile) -> None:
    """The shapes of `generate_shapes`, and stuff on all of the rest, each class once at most."""
    kinds, bands, thing_counts, crowds, void, numbers = Counter(), Counter(), [], 0, 0, []
    for index, image_id in enumerate(validation.image_ids):
        segments, ids = validation[image_id].segments, validation.read_map(image_id)
        table = measure_segments(ids)
        listed = sorted((s.id, s.area, *s.box) for s in segments)
        x1, y1, x2, y2 = table.boxes.T
        assert [list(row) for row in listed] == np.stack([table.ids, table.areas, x1, y1, x2 - x1, y2 - y1], 1).tolist()
        stuff = [s.category_id for s in segments if s.category_id in STUFF.values()]
        assert len(stuff) == len(set(stuff)) <= 3
        kinds.update(s.category_id for s in segments)
        thing_counts.append(sum(not s.is_crowd for s in segments) - len(stuff))
        crowds += sum(s.is_crowd for s in segments)
        numbers += [s.id for s in segments]
        if index % 7 == 6:
            void += (ids == 0).mean() > 0.05
        else:
            assert (ids > 0).all()
            bands[len(stuff)] += 1
    assert set(kinds) == {*CLASSES.values(), *STUFF.values()} == {1, 3, 4, 7, 10, 12, 13, 17, 20}
    assert thing_counts.count(0) == 2 and all(2 <= count <= 8 for count in thing_counts if count)
    assert crowds == 4 and void >= 13
    assert 10 <= bands[1] <= 30 and 30 <= bands[2] <= 55 and 20 <= bands[3] <= 45
    assert np.median(numbers) > 2**22  # ids of three bytes


def test_it_loads(root: Path) -> None:
    dataset = CocoPanoptic(root / "annotations" / "panoptic_train2017.json", root / "train2017", training=True)
    assert dataset.class_names == [*CLASSES] and dataset.stuff_names == [*STUFF] and len(dataset) == 4
    sample = dataset[0]
    assert sample["image"].shape == (3, 192, 192) and (sample["semantic"][sample["masks"].bool().any(0)] == 5).all()


def test_it_is_written_once_and_over_nothing_else(root: Path, tmp_path: Path) -> None:
    assert not generate_panoptic_shapes(root, **SIZES)
    with pytest.raises(InputError, match="other data"):
        generate_panoptic_shapes(root, **{**SIZES, "seed": 1})
    with pytest.raises(InputError, match="other data"):
        generate_shapes(root, **SIZES)
    again = tmp_path / "again"
    assert generate_panoptic_shapes(again, **{**SIZES, "val_images": 1})
    for path in (again / "annotations" / "panoptic_train2017").iterdir():
        assert path.read_bytes() == (root / path.relative_to(again)).read_bytes()
    recorded = json.loads((again / "annotations" / "panoptic_val2017.json").read_text())
    assert recorded["categories"][4] == {"id": 10, "name": "waves", "isthing": 0, "supercategory": "texture"}
