"""Splits: stratified, groups together, the same for every order of the images."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from solov2.errors import InputError
from solov2.formats.annotated import AnnotatedImage, AnnotatedInstance
from solov2.formats.split import group_keys, split


def image(name: str, *classes: str) -> AnnotatedImage:
    return AnnotatedImage(name, 9, 9, [AnnotatedInstance(x, [[0, 0, 3, 0, 3, 3]]) for x in classes])


def names(images: list[AnnotatedImage]) -> set[str]:
    return {image.file_name for image in images}


def test_every_class_is_divided() -> None:
    rng = random.Random(0)
    chances = {"common": 0.9, "some": 0.3, "rare": 0.05}
    images = [image(f"{i:06d}.jpg", *(c for c, p in chances.items() if rng.random() < p)) for i in range(400)]
    train, val, groups = split(images, 0.2)
    assert groups == 400 and len(val) == pytest.approx(80, abs=4) and names(train) | names(val) == names(images)
    assert not names(train) & names(val)
    total, found = (Counter(x.class_name for i in part for x in i.instances) for part in (images, val))
    assert total["rare"] < 40 and all(found[c] == pytest.approx(0.2 * total[c], abs=2) for c in chances)


def test_the_order_of_the_images_does_not_matter() -> None:
    images = [image(f"{i}.jpg", "ab"[i % 2]) for i in range(50)]
    _, val, _ = split(images, 0.3)
    shuffled = random.Random(1).sample(images, len(images))
    assert names(split(shuffled, 0.3)[1]) == names(val)
    assert [x.file_name for x in val] == [x.file_name for x in images if x in val]


def test_groups_stay_together() -> None:
    images = [image(f"video{v:02d}_{i:06d}.jpg", "a") for v in range(10) for i in range(7)]
    train, val, groups = split(images, 0.2)
    assert groups == 10 and len(val) == 14
    assert not {x.file_name[:7] for x in train} & {x.file_name[:7] for x in val}


@pytest.mark.parametrize(
    ("files", "groups"),
    [
        (["video01_000123.jpg", "video01_000124.jpg", "video02_000001.jpg"], 2),
        (["a/1.jpg", "a/2.jpg", "b/1.jpg"], 2),
        (["000000000790.jpg", "000000024577.jpg"], 2),  # numbers alone, in one folder
        (["IMG_0001.jpg", "IMG_0002.jpg", "IMG_0003.jpg"], 3),  # one group would be all
        (["cat-frame12.png", "cat-frame13.png", "dog-frame12.png"], 2),
        (["ulm_000000_000019_leftImg8bit.png", "ulm_000000_000020_leftImg8bit.png", "bonn_000000_000019.png"], 2),
        (["a_jpg.rf.0f.jpg", "a_jpg.rf.3c.jpg", "b_jpg.rf.77.jpg"], 2),  # Roboflow's copies
        (["video1_jpg.rf.0f.jpg", "cat.jpg", "dog.jpg"], 3),
    ],
)
def test_group_keys(files: list[str], groups: int) -> None:
    assert len(set(group_keys(files).values())) == groups


def test_small_sets() -> None:
    for fraction in (0.01, 0.5, 0.99):
        train, val, _ = split([image("1.jpg", "a"), image("2.jpg")], fraction)
        assert len(train) == len(val) == 1
    with pytest.raises(InputError):
        split([image("1.jpg", "a")], 0.2)
