"""Every kind of image file and in-memory image becomes RGB uint8 [3, H, W], or is rejected with a clear message."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from solov2.errors import InputError
from solov2.ops import images
from solov2.ops.images import pil_to_tensor, read_header, read_image, to_rgb_tensor

HEIGHT, WIDTH = 6, 9


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def channels_first(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def save(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def header_only(path: Path, width: int, height: int) -> Path:
    """A PPM that ends after its header: any attempt to decode it fails."""
    path.write_bytes(f"P6 {width} {height} 255\n".encode())
    return path


def test_rgb_png(tmp_path, pixels):
    tensor = read_image(save(Image.fromarray(pixels), tmp_path / "a.png"), apply_exif=False)
    assert tensor.dtype == torch.uint8 and torch.equal(tensor, channels_first(pixels))


def test_gray_is_repeated(tmp_path, pixels):
    gray = pixels[:, :, 0]
    tensor = read_image(save(Image.fromarray(gray), tmp_path / "a.png"), apply_exif=False)
    assert torch.equal(tensor, channels_first(np.stack([gray] * 3, axis=2)))


def test_one_bit_image(tmp_path, pixels):
    bits = pixels[:, :, 0] > 128
    tensor = read_image(save(Image.fromarray(bits), tmp_path / "a.png"), apply_exif=False)
    assert torch.equal(tensor[1], torch.from_numpy(bits) * 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa"])
def test_alpha_is_dropped_not_composited(pixels, mode):
    alpha = np.full((HEIGHT, WIDTH, 1), 255 if mode == "RGBa" else 3, dtype=np.uint8)
    if mode == "LA":
        image = Image.fromarray(np.concatenate((pixels[:, :, :1], alpha), axis=2), "LA")
        expected = np.repeat(pixels[:, :, :1], 3, axis=2)
    else:
        image, expected = Image.fromarray(np.concatenate((pixels, alpha), axis=2), "RGBA").convert(mode), pixels
    assert torch.equal(pil_to_tensor(image), channels_first(expected))


def test_palette_with_transparency(tmp_path):
    indices = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 4
    palette = np.array([[250, 10, 20], [0, 200, 30], [5, 6, 255], [90, 90, 90]], dtype=np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(palette.tobytes())
    path = save(image, tmp_path / "a.png", transparency=bytes([0, 128, 255, 7]))
    with Image.open(path) as stored:
        assert stored.mode == "P" and "transparency" in stored.info
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(read_image(path, apply_exif=False), channels_first(palette[indices]))


@pytest.mark.parametrize("suffix", [".png", ".pgm", ".tif"])
def test_16_bit_keeps_the_upper_byte(tmp_path, suffix):
    deep = np.random.RandomState(1).randint(0, 65536, (HEIGHT, WIDTH)).astype(np.uint16)
    path = save(Image.fromarray(deep), tmp_path / f"a{suffix}")
    with Image.open(path) as stored:
        assert stored.mode.startswith("I")
    expected = torch.from_numpy((deep >> 8).astype(np.uint8)).expand(3, -1, -1)
    assert torch.equal(read_image(path, apply_exif=False), expected)


def test_32_bit_mode_is_read_as_16_bits():
    image = Image.fromarray(np.array([[0, 256, 65535, 70000, -5]], dtype=np.int32))
    assert image.mode == "I"
    assert pil_to_tensor(image)[0].tolist() == [[0, 1, 255, 255, 0]]


def test_32_bit_file_is_rejected(tmp_path):
    """Read as 16 bits, small values would give a black image."""
    path = save(Image.fromarray(np.array([[0, 100, 200]], dtype=np.int32)), tmp_path / "deep.tif")
    with Image.open(path) as stored:
        assert stored.mode == "I"
        with pytest.raises(InputError, match="32-bit"):
            to_rgb_tensor(stored)
    with pytest.raises(InputError, match="deep.tif.*32-bit"):
        read_image(path, apply_exif=False)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I;16", "I"]
)
def test_large_images_are_converted_in_parts(pixels, monkeypatch, mode):
    deep = {"I;16": np.uint16, "I": np.int32}.get(mode)
    image = Image.fromarray(pixels) if deep is None else Image.fromarray(pixels[:, :, 0].astype(deep) * 200)
    image = image.convert("L").convert("PA") if mode == "PA" else image.convert(mode)
    assert image.mode == mode
    whole = pil_to_tensor(image)
    assert whole.shape == (3, HEIGHT, WIDTH) and whole.permute(1, 2, 0).is_contiguous()
    for budget in (1, WIDTH, 4 * WIDTH, 100 * WIDTH):
        monkeypatch.setattr(images, "_CHUNK_PIXELS", budget)
        assert torch.equal(pil_to_tensor(image), whole)


def test_cmyk_jpeg(tmp_path):
    cmyk = np.zeros((16, 16, 4), dtype=np.uint8)
    cmyk[:, :, 0] = 255  # full cyan
    path = save(Image.fromarray(cmyk, "CMYK"), tmp_path / "a.jpg", quality=100)
    with Image.open(path) as stored:
        assert stored.mode == "CMYK"
    expected = torch.tensor([0, 255, 255])[:, None, None]
    assert (read_image(path, apply_exif=False).int() - expected).abs().max() <= 3


def test_float_image_file_is_rejected(tmp_path):
    path = save(Image.fromarray(np.ones((4, 4), dtype=np.float32)), tmp_path / "depth.tif")
    with pytest.raises(InputError, match="depth.tif.*pixel format F"):
        read_image(path, apply_exif=False)


@pytest.fixture
def rotated(tmp_path, pixels) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: a viewer rotates it by 90 degrees clockwise
    return save(Image.fromarray(pixels), tmp_path / "turned.png", exif=exif)


def test_exif_rotation_only_where_asked(rotated, pixels):
    assert torch.equal(read_image(rotated, apply_exif=False), channels_first(pixels))
    assert torch.equal(read_image(rotated, apply_exif=True), channels_first(np.rot90(pixels, k=-1)))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(11))
def test_all_orientations(tmp_path, pixels, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(Image.fromarray(pixels), tmp_path / f"a{suffix}", exif=exif)
    with Image.open(path) as stored:
        expected = pil_to_tensor(ImageOps.exif_transpose(stored))
    assert expected.shape[1:] == ((WIDTH, HEIGHT) if 5 <= orientation <= 8 else (HEIGHT, WIDTH))
    assert torch.equal(read_image(path, apply_exif=True), expected)
    is_tiff = suffix == ".tif"  # Pillow turns it while decoding
    assert read_header(path).turned == (2 <= orientation <= 8 and not is_tiff)
    header = read_header(path)
    assert read_image(path, apply_exif=False).shape == (3, header.height, header.width)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0" + b"\xff" * 40,
        b"Exif\0\0garbage",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x01\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x0a\0\0\0\x01\0\0\0\x1a\0\0\0\0\0\0",
    ],
)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_corrupt_exif_counts_as_none(tmp_path, pixels, suffix, exif):
    plain = save(Image.fromarray(pixels), tmp_path / f"plain{suffix}")
    path = save(Image.fromarray(pixels), tmp_path / f"corrupt{suffix}", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(read_image(path, apply_exif=True), read_image(plain, apply_exif=True))
        assert not read_header(path).turned


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp"])
def test_animations_give_their_first_frame_and_a_warning(tmp_path, pixels, suffix, caplog):
    gray, other = (Image.fromarray(array[:, :, 0]) for array in (pixels, 255 - pixels))
    path = save(gray, tmp_path / f"moving{suffix}", save_all=True, append_images=[other], lossless=True)
    still = save(gray, tmp_path / f"still{suffix}", lossless=True)
    assert read_header(path).animated and not read_header(still).animated
    assert torch.equal(to_rgb_tensor(still), to_rgb_tensor(path))
    (record,) = caplog.records
    assert path.name in record.getMessage()
    read_image(path, apply_exif=False)  # not in training, where every epoch would repeat it
    assert len(caplog.records) == 1


def test_a_damaged_second_frame_does_not_matter(tmp_path, pixels):
    first, second = (Image.fromarray(array[:, :, 0]) for array in (pixels, 255 - pixels))
    path = save(first, tmp_path / "whole.gif", save_all=True, append_images=[second])
    with Image.open(path) as image:
        image.seek(1)
        start = image.tile[0].offset  # of the second frame's pixels; its header is before it
    for end in range(start - 30, start):
        content = path.read_bytes()[:end]
        assert torch.equal(to_rgb_tensor(content), to_rgb_tensor(first))
        assert read_header(content)[:2] == (HEIGHT, WIDTH)


def test_a_phone_photo_with_a_second_image_is_no_animation(tmp_path, pixels, caplog):
    path = save(Image.fromarray(pixels), tmp_path / "a.mpo", save_all=True, append_images=[Image.fromarray(pixels)])
    assert to_rgb_tensor(path).shape == (3, HEIGHT, WIDTH)
    assert not read_header(path).animated and not caplog.records


def test_contents_of_files(tmp_path, rotated, pixels):
    """bytes and files opened in binary mode count as files, also if they cannot seek, and stay open."""
    content, expected = rotated.read_bytes(), read_image(rotated, apply_exif=True)

    class Stream:
        read = io.BytesIO(content).read

    memory = io.BytesIO(content)
    memory.seek(50)  # read from its start all the same
    with open(rotated, "rb") as file:
        for source in (content, bytearray(content), memoryview(content), memory, memory, file, Stream()):
            assert torch.equal(to_rgb_tensor(source), expected)
        assert not file.closed and not memory.closed
        file.seek(0)
        assert file.read() == content
    assert torch.equal(read_image(content, apply_exif=False), channels_first(pixels))
    assert read_header(io.BytesIO(content))[:2] == (HEIGHT, WIDTH)
    with open(rotated, "rb") as file, pytest.raises(InputError, match="turned.png.*1 allowed|turned.png.*of 1 "):
        to_rgb_tensor(file, max_pixels=1)
    with open(rotated, encoding="latin-1") as text, pytest.raises(TypeError, match="binary mode"):
        to_rgb_tensor(text)
    with pytest.raises(TypeError, match="binary mode"):
        to_rgb_tensor(io.StringIO("x"))
    with pytest.raises(InputError, match="closed"):
        to_rgb_tensor(file)


def test_names_of_any_bytes(tmp_path, pixels):
    for name in (b"a\xff\x1b[31m\n.png", "\u00e4\u4e2d.png".encode()):
        path = tmp_path / Path(bytes(name).decode("utf-8", "surrogateescape"))
        path.write_bytes(save(Image.fromarray(pixels), tmp_path / "plain.png").read_bytes())
        assert torch.equal(to_rgb_tensor(path), channels_first(pixels))
        assert torch.equal(to_rgb_tensor(str(path)), channels_first(pixels))


def test_pil_images_that_cannot_be_decoded(tmp_path, pixels):
    path = save(Image.fromarray(np.tile(pixels, (20, 20, 1))), tmp_path / "cut.jpg")
    path.write_bytes(path.read_bytes()[:-2000])
    with Image.open(path) as image, pytest.raises(InputError, match="cut.jpg cannot be read"):
        to_rgb_tensor(image)
    image = Image.open(save(Image.fromarray(pixels), tmp_path / "a.png"))
    image.close()
    with pytest.raises(InputError, match="a.png cannot be read.*closed"):
        to_rgb_tensor(image)
    with pytest.raises(InputError, match="0 x 5"):
        to_rgb_tensor(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1)])
def test_thin_images(tmp_path, shape):
    values = np.random.RandomState(0).randint(0, 256, (*shape, 3), dtype=np.uint8)
    path = save(Image.fromarray(values), tmp_path / "thin.png")
    assert torch.equal(to_rgb_tensor(path), channels_first(values))


def test_to_rgb_tensor_rotates_files_but_not_pil_images(rotated, pixels):
    for path in (rotated, str(rotated)):
        assert to_rgb_tensor(path).shape == (3, WIDTH, HEIGHT)
    with Image.open(rotated) as image:
        assert torch.equal(to_rgb_tensor(image), channels_first(pixels))


def test_truncated_jpeg(tmp_path):
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(Image.fromarray(noise), tmp_path / "cut.jpg")
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(InputError, match="cut.jpg cannot be read.*truncated"):
        read_image(path, apply_exif=True)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_other_content(tmp_path, content):
    path = tmp_path / "odd.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match="odd.png cannot be read"):
        read_image(path, apply_exif=False)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match="gone.jpg does not exist"):
        read_image(tmp_path / "gone.jpg", apply_exif=False)
    with pytest.raises(InputError, match="folder.*find_images"):
        to_rgb_tensor(tmp_path)


def test_size_is_checked_before_decoding(tmp_path):
    path = header_only(tmp_path / "large.ppm", 3000, 2000)
    with pytest.raises(InputError, match="large.ppm .*3000 x 2000 .*5999999"):
        read_image(path, apply_exif=False, max_pixels=5_999_999)
    with pytest.raises(InputError, match="large.ppm cannot be read"):
        read_image(path, apply_exif=False, max_pixels=6_000_000)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [13_400, 60_000])
def test_default_limit(tmp_path, side):
    with pytest.raises(InputError, match="bomb.ppm.* pixels"):
        read_image(header_only(tmp_path / "bomb.ppm", side, side), apply_exif=False)


def test_arrays(pixels):
    assert torch.equal(to_rgb_tensor(pixels), channels_first(pixels))
    assert torch.equal(to_rgb_tensor(pixels[:, :, ::-1]), channels_first(pixels[:, :, ::-1]))  # negative stride
    gray = channels_first(np.repeat(pixels[:, :, :1], 3, axis=2))
    assert torch.equal(to_rgb_tensor(pixels[:, :, 0]), gray) and torch.equal(to_rgb_tensor(pixels[:, :, :1]), gray)
    with_alpha = np.concatenate((pixels, pixels[:, :, :1]), axis=2)
    assert torch.equal(to_rgb_tensor(with_alpha), channels_first(pixels))


def test_arrays_are_copied(pixels):
    before = pixels.copy()
    tensor = to_rgb_tensor(pixels)
    pixels[:] = 0
    assert torch.equal(tensor, channels_first(before))
    pixels.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_rgb_tensor(pixels)


def test_tensors(pixels):
    tensor = channels_first(pixels)
    assert torch.equal(to_rgb_tensor(tensor), tensor)
    assert torch.equal(to_rgb_tensor(tensor[:1]), tensor[:1].expand(3, -1, -1))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_float_arrays_hold_the_same_pixels(pixels, dtype):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for array in (levels, pixels, pixels[:, ::-1]):
        assert torch.equal(to_rgb_tensor((array / 255).astype(dtype)), to_rgb_tensor(array))
    with_alpha = np.concatenate((pixels / 255, np.full((HEIGHT, WIDTH, 1), np.nan)), axis=2).astype(dtype)
    assert torch.equal(to_rgb_tensor(with_alpha), channels_first(pixels))  # alpha is dropped unchecked


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_float_tensors_hold_the_same_pixels(dtype):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    for division in (levels.to(dtype) / 255, (levels.double() / 255).to(dtype)):
        kept = division.clone()
        assert torch.equal(to_rgb_tensor(division), levels.expand(3, -1, -1))
        assert torch.equal(division, kept)
    halves = torch.tensor([0.4999 / 255, 0.5001 / 255, 1 - 0.4999 / 255]).view(1, 1, 3)
    assert to_rgb_tensor(halves)[0].tolist() == [[0, 1, 255]]  # the nearest level, not the one below


@pytest.mark.parametrize(
    ("value", "found"),
    [(255.0, "values from 0 to 255"), (-0.25, "values from -0.25 to 0"), (1.001, "values from 0 to 1.001"),
     (np.nan, "NaN"), (np.inf, "values from 0 to inf")],
)  # fmt: skip
def test_floats_outside_their_range_are_rejected(value, found):
    array = np.zeros((4, 5, 3), dtype=np.float32)
    array[2, 3, 1] = value
    for image in (array, array.astype(np.float64), torch.from_numpy(array).permute(2, 0, 1)):
        with pytest.raises(InputError) as caught:
            to_rgb_tensor(image)
        assert all(part in str(caught.value) for part in ("0..1", found, "uint8"))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), dtype=np.int64),
        np.zeros((4, 4, 3), dtype=bool),
        np.zeros((4, 4, 3), dtype=np.complex64),
        np.zeros((3, 40, 40), dtype=np.float32),
        np.zeros((3, 40, 40), dtype=np.uint8),
        np.zeros((0, 4, 3), dtype=np.uint8),
        np.zeros(4, dtype=np.uint8),
        torch.zeros(3, 4, 4, dtype=torch.int64),
        torch.zeros(4, 4, 3),
        torch.zeros(4, 4, 3, dtype=torch.uint8),
        torch.zeros(4, 4, dtype=torch.uint8),
        torch.zeros(3, 0, 4, dtype=torch.uint8),
        np.zeros((2, 4, 4, 3), dtype=np.uint8),
        np.array([[None, 1.0]]),
        torch.zeros(2, 3, 4, 4),
    ],
    ids=lambda image: f"{type(image).__name__}-{image.dtype}-{list(image.shape)}",
)
def test_other_shapes_and_dtypes_are_rejected(image):
    with pytest.raises(InputError, match=r"an image (array|tensor) must be uint8, or float") as caught:
        to_rgb_tensor(image)
    assert f"{image.dtype} {list(image.shape)}" in str(caught.value)


def test_tensors_without_values_here():
    for tensor, words in (
        (torch.zeros(3, 4, 4, device="meta"), "meta"),
        (torch.zeros(3, 4, 4, device="meta", dtype=torch.uint8), "meta"),
        (torch.zeros(3, 4, 4).to_sparse(), "sparse"),
    ):
        with pytest.raises(InputError, match=words):
            to_rgb_tensor(tensor)


def test_tensors_and_arrays_with_odd_memory(pixels):
    expected = channels_first(pixels)
    grad = (expected / 255).requires_grad_()
    assert torch.equal(to_rgb_tensor(grad), expected) and not to_rgb_tensor(grad).requires_grad
    for array in (pixels[::-1, ::-1], pixels[::2, ::3], np.asfortranarray(pixels), pixels[:, :, ::-1]):
        assert torch.equal(to_rgb_tensor(array), channels_first(array))
        assert torch.equal(to_rgb_tensor(torch.from_numpy(array.copy()).permute(2, 0, 1)), channels_first(array))


@pytest.mark.parametrize("value", [None, 5, 1.5, ["a.jpg"], {"a.jpg": 1}, object()])
def test_other_types_are_rejected(value):
    with pytest.raises(TypeError, match=f"bytes.*not {type(value).__name__}"):
        to_rgb_tensor(value)
