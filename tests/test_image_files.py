"""Image files are found by extension, and one that cannot be read is refused with the reason."""

from __future__ import annotations

import json
import logging
import os
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.coco_files import CocoTree
from PIL import Image, features

from solov2.config import Config, load_config
from solov2.data.build import oracle_dataset, training_dataset, validation_dataset
from solov2.data_check.check import check_data
from solov2.errors import InputError
from solov2.ops import image_files
from solov2.ops.image_files import check_file, find_images, image_suffixes
from solov2.ops.images import read_header, read_image

PIXELS = np.random.RandomState(0).randint(0, 256, (6, 9, 3), dtype=np.uint8)
EXPECTED = torch.from_numpy(PIXELS).permute(2, 0, 1)


def save(path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(PIXELS).save(path, **options)
    return path


def write_tiff(path: Path, bands: np.ndarray, *, photometric: int, sample_format: int = 1) -> Path:
    """An uncompressed TIFF of any number of bands [H, W, C], as Pillow does not write it."""
    (height, width, count), data = bands.shape, bands.tobytes()
    shorts = {258: [8 * bands.itemsize] * count, 259: [1], 262: [photometric], 277: [count], 284: [1]}
    shorts |= {338: [0] * (count - 3 if photometric == 2 else count - 1), 339: [sample_format] * count}
    longs = {256: [width], 257: [height], 273: [8], 278: [height], 279: [len(data)]}
    tags = {tag: (3, values) for tag, values in shorts.items() if values}
    tags |= {tag: (4, values) for tag, values in longs.items()}
    entries, far, end = b"", b"", 8 + len(data) + 2 + 12 * len(tags) + 4
    for tag, (kind, values) in sorted(tags.items()):
        packed = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        value = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack("<I", end + len(far))
        far += packed if len(packed) > 4 else b""
        entries += struct.pack("<HHI", tag, kind, len(values)) + value
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + far)
    return path


def test_suffixes_are_those_of_what_pillow_reads():
    found = image_suffixes()
    assert {".jpg", ".jfif", ".jpe", ".mpo", ".png", ".gif", ".jp2", ".tga", ".webp", ".bmp", ".tif", ".pgm"} <= found
    assert (".avif" in found) == features.check("avif")
    assert not found & {".eps", ".ps", ".pdf", ".h5", ".mpg", ".wmf", ".grib", ".txt", ""}


def test_images_are_found_in_subfolders_and_the_others_counted(tmp_path, caplog):
    root, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    names = ["b.png", "A.JPE", "x/y/c.gif", "x/d.jfif", "x.png/e.tga", "z.jp2"]
    for name in names:
        save(root / name, format="PNG")
    save(elsewhere / "linked.webp")
    (root / "link").symlink_to(elsewhere, target_is_directory=True)
    (root / "x" / "circle").symlink_to(root, target_is_directory=True)
    (root / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")  # found, so that reading names it
    for name in (".hidden.jpg", ".cache/thumbnail.jpg", "._b.png"):
        save(root / name, format="PNG")
    for name in ("notes.txt", "x/more.txt", "x/README", "scan.pdf"):
        (root / name).write_text("no image")
    with caplog.at_level(logging.INFO, "solov2"):
        found = find_images(root)
    assert found == sorted([root / name for name in [*names, "gone.jpg", "link/linked.webp"]])
    assert find_images(str(root)) == found
    (message, *_), text = [record.getMessage() for record in caplog.records], caplog.text
    assert "4 files" in message and all(part in text for part in ("2 .txt", "1 .pdf", "1 without extension"))


def test_folders_without_images(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    for path, words in ((tmp_path, "no images"), (tmp_path / "gone", "not exist"), (tmp_path / "notes.txt", "folder")):
        with pytest.raises(InputError, match=f"{path.name}.*{words}"):
            find_images(path)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, caplog):
    save(tmp_path / "a.png")
    save(tmp_path / "locked" / "b.png")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert find_images(tmp_path) == [tmp_path / "a.png"]
    assert "locked" in caplog.text


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "video"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"%PDF-1.7\n", "PDF"),
        (b"<!DOCTYPE html><html>404</html>", "HTML"),
        (b"\xef\xbb\xbf<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"PK\x03\x04" + bytes(40), "archive"),
        (b"II*\0\xff\xff\xff\xff", "damaged"),
        (b"II*\0\x08\0\0\0\0\0\0\0\0\0", "damaged"),
        (b"hello", "damaged"),
    ],
)
def test_what_a_file_is_instead_of_an_image(tmp_path, content, word):
    path = tmp_path / "odd.jpg"
    path.write_bytes(content)
    for source, name in ((path, "odd.jpg"), (content, f"of {len(content)} bytes")):
        with pytest.raises(InputError, match=f"image .*{name} cannot be read: .*{word}"):
            read_image(source, apply_exif=True)


@pytest.mark.parametrize(
    ("dtype", "bands", "photometric", "sample_format", "words"),
    [
        ("u1", 5, 1, 1, "5 bands of 8-bit unsigned"),
        ("<u2", 5, 2, 1, "5 bands of 16-bit unsigned"),
        ("<f4", 3, 2, 3, "3 bands of 32-bit floats"),
        ("<f8", 1, 1, 3, "1 band of 64-bit floats"),
        ("<u4", 1, 1, 1, "32-bit or signed"),
        ("<i2", 1, 1, 2, "32-bit or signed"),
        ("<f4", 1, 1, 3, "pixel format F"),
    ],
)
def test_tiffs_without_a_rule_are_named(tmp_path, dtype, bands, photometric, sample_format, words):
    values = np.concatenate([PIXELS] * 2, axis=2)[:, :, :bands].astype(dtype)
    path = write_tiff(tmp_path / "odd.tif", values, photometric=photometric, sample_format=sample_format)
    with pytest.raises(InputError, match=f"odd.tif.*{words}"):
        read_image(path, apply_exif=False)


@pytest.mark.parametrize("bands", [3, 4, 5, 6])
def test_bands_after_rgb_are_dropped(tmp_path, bands):
    path = write_tiff(tmp_path / "a.tif", np.concatenate([PIXELS] * 2, axis=2)[:, :, :bands], photometric=2)
    assert torch.equal(read_image(path, apply_exif=False), EXPECTED)


def test_a_tiff_of_several_pages_is_refused_but_not_one_with_a_thumbnail(tmp_path):
    page, pages = Image.fromarray(PIXELS), [Image.fromarray(255 - PIXELS) for _ in range(2)]
    page.save(tmp_path / "stack.tif", save_all=True, append_images=pages)
    for read in (read_header, lambda path: read_image(path, apply_exif=True)):
        with pytest.raises(InputError, match=r"stack\.tif has 3 pages"):
            read(tmp_path / "stack.tif")
    for kind in (1, 4):  # NewSubfileType: reduced resolution, transparency mask
        for other in pages:
            other.encoderinfo = {"tiffinfo": {254: kind}}
        page.save(tmp_path / "overviews.tif", save_all=True, append_images=pages)
        with Image.open(tmp_path / "overviews.tif") as stored:
            assert stored.n_frames == 3
        assert torch.equal(read_image(tmp_path / "overviews.tif", apply_exif=True), EXPECTED)


def test_a_tiff_whose_second_page_is_damaged(tmp_path):
    path = write_tiff(tmp_path / "a.tif", PIXELS, photometric=2)
    data = bytearray(path.read_bytes())
    directory = struct.unpack("<I", data[4:8])[0]
    link = directory + 2 + 12 * struct.unpack("<H", data[directory : directory + 2])[0]
    for offset in (9, 2**32 - 1, directory + 1):
        data[link : link + 4] = struct.pack("<I", offset)
        assert torch.equal(read_image(bytes(data), apply_exif=True), EXPECTED)


def test_formats_that_pillow_leaves_to_other_programs(tmp_path):
    save(tmp_path / "a.eps")
    (tmp_path / "b.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    for name, kind in (("a.eps", "EPS"), ("b.h5", "HDF5")):
        with pytest.raises(InputError, match=f"{name} has the unsupported format {kind}"):
            read_image(tmp_path / name, apply_exif=True)


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")  # opening it would wait for ever
    (tmp_path / "link.jpg").symlink_to("target.jpg")
    (tmp_path / "circle.jpg").symlink_to("circle.jpg")
    for path, words in (
        (tmp_path, "folder.*solov2.find_images"),
        (tmp_path / "fifo.jpg", "fifo.jpg is not a regular file"),
        ("/dev/zero", "/dev/zero is not a regular file"),
        (tmp_path / "link.jpg", "link.jpg is a link to target.jpg"),
        (tmp_path / "circle.jpg", "circle.jpg is a link"),
        (tmp_path / "gone.jpg", "gone.jpg does not exist"),
        (tmp_path / "fifo.jpg" / "a.jpg", "a.jpg does not exist"),
        ("https://example.org/a.jpg", "https://example.org/a.jpg is a URL"),
        (Path("https://example.org/a.jpg"), "is a URL"),
        ("data:image/png;base64,iVBORw0KGgo=", "is a URL"),
        ("a\0b.jpg", "cannot be read"),
        ("x" * 5000, r"x{100}\.\.\. \(5000 characters\) cannot be read"),
    ):
        with pytest.raises(InputError, match=words):
            check_file(path)
        with pytest.raises(InputError, match=words):
            read_image(path, apply_exif=True)


def test_permission_and_memory_are_not_called_damage(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png")
    for error, words in ((PermissionError(13, "Permission denied"), "Permission denied$"), (MemoryError(), "memory$")):

        def fail(_file, error=error):
            raise error

        monkeypatch.setattr(image_files.Image, "open", fail)
        with pytest.raises(InputError, match=f"a.png cannot be read: .*{words}"):
            read_image(path, apply_exif=True)


def test_the_limit_of_pixels_can_be_above_that_of_pillow(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png")  # 54 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # Pillow stops at twice that
    for limit in (39, 53):
        with pytest.raises(InputError, match=f"a.png.* pixels, more than the maximum of {limit}.*max_image_pixels"):
            read_image(path, apply_exif=True, max_pixels=limit)
    assert torch.equal(read_image(path, apply_exif=True, max_pixels=54), EXPECTED)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(InputError, match="9 x 6 pixels"):
        read_image(path, apply_exif=True, max_pixels=53)


def config_of(tree: CocoTree, limit: int) -> Config:
    paths = {f"data.{split}_annotations": str(tree.file) for split in ("train", "val")}
    paths |= {f"data.{split}_images": str(tree.images) for split in ("train", "val")}
    small = {"data.train_scales": [48], "data.train_long_edge": 64}
    return load_config("quickstart", {**paths, **small, "data.max_image_pixels": limit})


def test_the_limit_of_pixels_in_training_evaluation_and_check_data(tmp_path):
    """data.max_image_pixels holds for what the annotation file states and for what the files have."""
    tree = CocoTree(tmp_path)  # images of 64 x 48 = 3072 pixels
    tree.file.write_text(json.dumps(tree.content))
    for build in (training_dataset, validation_dataset, partial(oracle_dataset, split="val")):
        assert build(config_of(tree, 3072))[0]["image"].shape == (3, 48, 64)
        with pytest.raises(InputError, match="image 1 .*64 x 48 .*3071 .*max_image_pixels"):
            build(config_of(tree, 3071))
    kinds = [finding.kind for finding in check_data(tree.content, tree.images, config_of(tree, 3071)).findings]
    assert kinds.count("size") == 3

    tree.save("1.png", np.zeros((48, 65, 3), dtype=np.uint8))
    with pytest.raises(InputError, match="1.png has 65 x 48 .*3072"):
        validation_dataset(config_of(tree, 3072))[0]
    assert "unreadable file" in [f.kind for f in check_data(tree.content, tree.images, config_of(tree, 3072)).findings]

    tree.image["width"] = image_files.MAX_PIXELS  # raised above the default
    tree.file.write_text(json.dumps(tree.content))
    with pytest.raises(InputError, match="1.png is 65 x 48"):
        validation_dataset(config_of(tree, 10**10))[0]


def test_check_data_names_animations(tmp_path):
    tree = CocoTree(tmp_path)
    frames = [Image.fromarray(np.full((48, 64), level, dtype=np.uint8)) for level in (0, 99)]
    frames[0].save(tree.images / "1.png", save_all=True, append_images=frames[1:])
    findings = check_data(tree.content, tree.images, config_of(tree, 3072)).findings
    assert [(f.severity, f.file) for f in findings if f.kind == "animation"] == [("warning", "1.png")]
