"""Every kind of image file and in-memory image becomes RGB uint8 [3, H, W], or is rejected with a clear message."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from solov2.errors import InputError
from solov2.ops.images import pil_to_tensor, read_image, to_rgb_tensor

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
    with pytest.raises(InputError, match="not a file"):
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
    ],
    ids=lambda image: f"{type(image).__name__}-{image.dtype}-{list(image.shape)}",
)
def test_other_shapes_and_dtypes_are_rejected(image):
    with pytest.raises(InputError, match=r"an image (array|tensor) must be uint8, or float") as caught:
        to_rgb_tensor(image)
    assert f"{image.dtype} {list(image.shape)}" in str(caught.value)


def test_other_types_are_rejected():
    with pytest.raises(TypeError, match="not bytes"):
        to_rgb_tensor(b"abc")
