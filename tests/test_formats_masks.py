"""Mask PNGs: VOC's pairs, Cityscapes' 16 bits, and numbered ones as they are written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.format_files import HEIGHT, WIDTH, box_mask, boxes, rle, save_images, write
from PIL import Image

from solov2.errors import InputError
from solov2.formats import labelme, masks, yolo
from solov2.formats.annotated import AnnotatedImage, AnnotatedInstance, Losses
from solov2.formats.recognize import read, recognize

FIRST, SECOND = box_mask(2, 3, 10, 8), box_mask(20, 10, 6, 6)


def plane(*pairs: tuple[np.ndarray, int]) -> np.ndarray:
    pixels = np.zeros((HEIGHT, WIDTH), dtype=np.int64)
    for mask, number in pairs:
        pixels[mask] = number
    return pixels


def save(path: Path, pixels: np.ndarray, mode: str = "P") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels.astype({"I;16": np.uint16}.get(mode, np.uint8)))
    if mode == "P":
        image.putpalette([value for i in range(256) for value in (i * 37 % 256, i * 91 % 256, i)])
    image.save(path)


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    save_images(tmp_path, "JPEGImages/a.jpg", "JPEGImages/b.jpg", "JPEGImages/not_annotated.jpg")
    border = box_mask(1, 2, 12, 10) & ~FIRST
    save(tmp_path / "SegmentationObject/a.png", plane((border, 255), (FIRST, 1), (SECOND, 2)))
    save(tmp_path / "SegmentationClass/a.png", plane((border, 255), (FIRST, 15), (SECOND, 7)))
    for name in ("Object", "Class"):
        save(tmp_path / f"Segmentation{name}/b.png", plane((FIRST, 255)))
    write(tmp_path / "ImageSets/Segmentation/train.txt", "a\n")
    write(tmp_path / "ImageSets/Segmentation/val.txt", "b\n")
    return tmp_path


def test_voc(voc: Path) -> None:
    reading = read(voc)
    assert recognize(voc) == "voc" and len(reading.class_names) == 20
    assert boxes(reading) == {"a.jpg": [("person", 2, 3, 10, 8, 80), ("car", 20, 10, 6, 6, 36)], "b.jpg": []}
    assert [image.split for image in reading.images] == ["train", "val"]
    write(voc / "classes.txt", "\n".join("abcdefghijklmnopqrst"))
    assert read(voc).images[0].instances[0].class_name == "o"


def test_voc_malformed(voc: Path) -> None:
    save(voc / "SegmentationClass/a.png", plane((FIRST, 21), (SECOND, 7)))
    with pytest.raises(InputError, match="a.png, number 1 has the class 21"):
        read(voc)
    save(voc / "SegmentationClass/a.png", plane((SECOND, 7)))
    with pytest.raises(InputError, match="a.png, number 1 has the class 0"):
        read(voc)
    save(voc / "SegmentationClass/a.png", plane()[1:])
    with pytest.raises(InputError, match="60 x 39.*a.jpg is 60 x 40"):
        read(voc)
    save(voc / "SegmentationClass/a.png", np.zeros((HEIGHT, WIDTH, 3)), "RGB")
    with pytest.raises(InputError, match="a.png has the pixel format RGB"):
        read(voc)
    (voc / "SegmentationClass/a.png").unlink()
    with pytest.raises(InputError, match="SegmentationClass/a.png does not exist"):
        read(voc)


def test_cityscapes(tmp_path: Path) -> None:
    for split, city in (("train", "ulm"), ("val", "bonn")):
        save_images(tmp_path / f"leftImg8bit/{split}/{city}", f"{city}_0_1_leftImg8bit.png")
        crowd, road = box_mask(40, 0, 5, 5), box_mask(0, 30, 60, 10)
        pixels = plane((road, 7), (FIRST, 26000), (SECOND, 26001), (crowd, 24), (box_mask(50, 0, 2, 2), 29000))
        save(tmp_path / f"gtFine/{split}/{city}/{city}_0_1_gtFine_instanceIds.png", pixels, "I;16")
    for source in (tmp_path, tmp_path / "gtFine"):
        reading = read(source)
        assert recognize(source) == "cityscapes" and len(reading.class_names) == 8
        found = boxes(reading)["train/ulm/ulm_0_1_leftImg8bit.png"]
        assert found == [("person", 40, 0, 5, 5, 25), ("car", 2, 3, 10, 8, 80), ("car", 20, 10, 6, 6, 36)]
        assert [x.is_crowd for x in reading.images[0].instances] == [True, False, False]
        assert [image.split for image in reading.images] == ["train", "val"]
        assert sorted(reading.losses.counts.values()) == [2, 2]  # crowds, trailers
    save(tmp_path / "gtFine/val/bonn/bonn_0_1_gtFine_instanceIds.png", plane((FIRST, 7001)), "I;16")
    with pytest.raises(InputError, match="bonn_0_1.*7001"):
        read(tmp_path)


@pytest.mark.parametrize(("mode", "factor"), [("I;16", 1000), ("RGB", 1000), ("L", 1)])
def test_numbered(tmp_path: Path, mode: str, factor: int) -> None:
    save_images(tmp_path, "images/sub/a.jpg")
    numbers = plane((FIRST, factor + 1), (SECOND, factor + 2)) if factor > 1 else plane((FIRST, 1), (SECOND, 200))
    pixels = np.stack((numbers % 256, numbers // 256, numbers * 0), axis=2) if mode == "RGB" else numbers
    save(tmp_path / "masks/sub/a.png", pixels, mode)
    write(tmp_path / "classes.txt", "cell\n")
    reading = read(tmp_path)
    assert recognize(tmp_path) == "masks"
    assert boxes(reading) == {"sub/a.jpg": [("cell", 2, 3, 10, 8, 80), ("cell", 20, 10, 6, 6, 36)]}
    write(tmp_path / "classes.txt", "cell\nnucleus\n")
    if factor == 1:
        with pytest.raises(InputError, match="masks/sub/a.png, number 1: .*class 0"):
            read(tmp_path)
    else:
        assert boxes(read(tmp_path)) == boxes(reading)


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    save_images(tmp_path / "pictures", "a.jpg", "b.jpg")
    whole, inside, crowd = box_mask(0, 0, 30, 30), box_mask(5, 5, 10, 10), box_mask(40, 0, 5, 5)
    pairs = [("a", inside), ("b", whole), ("b", inside), ("a", SECOND)]
    instances = [AnnotatedInstance(name, rle(mask)) for name, mask in pairs]
    images = [
        AnnotatedImage("a.jpg", HEIGHT, WIDTH, [*instances, AnnotatedInstance("a", rle(crowd), True)]),
        AnnotatedImage("b.jpg", HEIGHT, WIDTH),
    ]
    losses = masks.write(images, ["a", "b"], tmp_path / "out")
    assert sorted(losses.counts.values()) == [1, 100 + 100 + 36]  # the first instance is covered
    reading = read(tmp_path / "out", tmp_path / "pictures")
    assert [image.file_name for image in reading.images] == ["a.jpg", "b.jpg"]
    found = {
        (x[0], instance.is_crowd, x[5]) for x, instance in zip(boxes(reading)["a.jpg"], reading.images[0].instances)
    }
    assert found == {("b", False, 900 - 100 - 36), ("b", False, 100), ("a", False, 36), ("a", True, 25)}
    again = masks.numbers_of(images[0], ["a", "b"], Losses())
    assert {int(x) for x in np.unique(again)} == {0, 1000, 1002, 2001, 2002}


def test_noise_takes_one_pass(tmp_path: Path) -> None:
    """A photograph in place of a mask: thousands of numbers."""
    save_images(tmp_path, "images/a.png", size=(300, 300))
    save(tmp_path / "masks/a.png", np.arange(90_000).reshape(300, 300) % 4_000, "I;16")
    write(tmp_path / "classes.txt", "cell\n")
    assert len(read(tmp_path).images[0].instances) == 3_999


def test_a_name_that_leads_out_is_not_written(tmp_path: Path) -> None:
    for name in ("../a.jpg", "/a.jpg"):
        image = AnnotatedImage(name, 4, 4)
        with pytest.raises(InputError, match="outside"):
            masks.write([image], ["a"], tmp_path / "out")
        with pytest.raises(InputError, match="outside"):
            yolo.write([image], ["a"], tmp_path / "out")
        with pytest.raises(InputError, match="outside"):
            labelme.write([image], tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_many_instances_and_broken_names(tmp_path: Path) -> None:
    many = [AnnotatedInstance("a", [[0, 0, 1, 0, 1, 1, 0, 1]])] * 1000
    with pytest.raises(InputError, match="999 instances of a"):
        masks.numbers_of(AnnotatedImage("a.jpg", 4, 4, many), ["a"], Losses())
    with pytest.raises(InputError, match="cannot be a line"):
        masks.write([], ["a\nb"], tmp_path)
