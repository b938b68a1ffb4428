"""Images from paths, PIL, arrays and tensors as RGB uint8 tensors.

Files come from anywhere, so the size is read from the header before a pixel is decoded, and every mode that Pillow can
open either becomes RGB by a written rule or is refused in one sentence.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

from solov2.errors import InputError

MAX_PIXELS = 178_956_970  # Pillow's own threshold for a decompression bomb: 512 MiB of RGB

TOLERANCE = 1e-3  # of float images, whose values resizing may push a little beyond 0..1
_HIGH_DEPTH = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # one channel of 16 bits; "I" is how older Pillow opens it
_NO_RULE = ("F", "LAB")  # floats have no fixed range, and Pillow does not convert LAB
_SCRIPTS = ("EPS", "WMF")  # formats that Pillow hands to another program
_TURNED = range(2, 9)  # EXIF orientations that are not upright
_VIA = {"P": "RGBA", "PA": "RGBA", "RGBa": "RGBA", "La": "LA"}  # modes without a direct, silent way to RGB


def read_image(path: str | Path, *, apply_exif: bool, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode one image file.

    Args:
        path: anything Pillow opens; of an animation the first frame.
        apply_exif: turn the picture as its EXIF orientation says. Right for photographs of users, wrong for data
            sets, whose annotations were drawn on the stored pixels.
        max_pixels: width x height above which the file is refused before decoding. Pillow itself stops at twice
            `MAX_PIXELS`, whatever is asked for here.

    Returns:
        uint8 [3, H, W], RGB; a view of interleaved memory (channels last), which is what resizing reads fastest.

    Raises:
        InputError: a file that is missing, damaged, truncated, too large or of a pixel format without a rule here.
    """
    with _opened(Path(path), max_pixels) as image:
        return pil_to_tensor(ImageOps.exif_transpose(image) if apply_exif else image)


class ImageHeader(NamedTuple):
    """What an image file says of itself before a pixel is decoded."""

    height: int
    width: int
    mode: str  # Pillow's: RGB, L, CMYK, ...
    deep: bool  # more than eight bits per channel
    turned: bool  # an EXIF orientation other than upright


def read_header(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Size and pixel format of an image file; `max_pixels` and errors are those of `read_image`."""
    with _opened(Path(path), max_pixels) as image:
        packing = str(image.tile[0][3]) if image.tile else ""  # how the decoder is to read 16-bit RGB: "RGB;16B"
        return ImageHeader(
            height=image.height,
            width=image.width,
            mode=image.mode,
            deep=image.mode in _HIGH_DEPTH or ";16" in packing,
            turned=image.getexif().get(0x0112) in _TURNED,
        )


@contextlib.contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[ImageFile.ImageFile]:
    """The file opened by Pillow, not yet decoded; what goes wrong inside becomes an InputError that names it."""
    try:
        if not path.is_file():
            raise InputError(f"image {path} does not exist or is not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides
            image = Image.open(path)
        with image:
            width, height = image.size
            if width * height > max_pixels:
                raise InputError(f"image {path}: {width} x {height} pixels are more than the {max_pixels} allowed")
            if image.format in _SCRIPTS:
                raise InputError(f"image {path} is of format {image.format}, which is not read here; convert it first")
            yield image
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"image {path}: {error}") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"image {path}: too many pixels, more than the {max_pixels} allowed ({error})") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ... on damaged files
        raise InputError(f"image {path} cannot be read, it may be damaged or truncated ({error})") from error


def pil_to_tensor(image: Image.Image) -> Tensor:
    """Pixels of a PIL image as RGB, without EXIF rotation: what is seen is what was passed.

    Gray is repeated. Alpha is dropped, not composited: colors stay those of the file, as in cv2.imread. 16-bit gray
    keeps its upper eight bits (mode "I" is taken for 16 bits). CMYK and palettes go through Pillow's conversion.

    Returns:
        uint8 [3, H, W]; a view of interleaved memory (channels last).

    Raises:
        InputError: a mode without a defined range of values, such as float.
    """
    if image.mode in _NO_RULE:
        raise InputError(f"pixel format {image.mode} has no rule here, convert the image to RGB first")
    if image.mode in _HIGH_DEPTH:
        gray = np.clip(np.array(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return torch.from_numpy(gray).expand(3, -1, -1).clone()
    rgb = image if image.mode == "RGB" else image.convert(_VIA.get(image.mode, image.mode)).convert("RGB")
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def to_rgb_tensor(image: str | Path | Image.Image | np.ndarray | Tensor) -> Tensor:
    """Any of the inputs that `SOLOv2.predict` takes, as uint8 [3, H, W] in RGB.

    Args:
        image: a path (EXIF rotation applied); a PIL image (as it is); an array [H, W], [H, W, 1], [H, W, 3] or
            [H, W, 4], RGB order, alpha dropped; a tensor [3, H, W] or [1, H, W]. Arrays and tensors are uint8, or float
            (16, 32 or 64 bits) in 0..1, which becomes the nearest of 256 levels: uint8 / 255 comes back exactly.

    Raises:
        TypeError: another type of object.
        InputError: another dtype or shape, no pixels, floats outside 0..1, or a file that cannot be read.
    """
    if isinstance(image, (str, Path)):
        return read_image(image, apply_exif=True)
    if isinstance(image, Image.Image):
        return pil_to_tensor(image)
    if isinstance(image, np.ndarray):
        return _array_to_tensor(image)
    if not isinstance(image, Tensor):
        raise TypeError(f"an image is a path, a PIL image, an array or a tensor, not {type(image).__name__}")
    known = image.dtype == torch.uint8 or image.is_floating_point()
    if not known or image.ndim != 3 or image.shape[0] not in (1, 3) or image.numel() == 0:
        raise InputError(
            "an image tensor is uint8, or float with values in 0..1, of [3, H, W] in RGB order, "
            f"not {image.dtype} {list(image.shape)}"
        )
    return _gray_levels(image).expand(3, -1, -1)


def _array_to_tensor(array: np.ndarray) -> Tensor:
    pixels = array[:, :, None] if array.ndim == 2 else array
    known = pixels.dtype.type in (np.uint8, np.float16, np.float32, np.float64)  # in either byte order
    if not known or pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or pixels.size == 0:
        raise InputError(
            "an image array is uint8, or float with values in 0..1, of [H, W, 3] in RGB order, "
            f"not {array.dtype} {list(array.shape)}"
        )
    # The copy makes BGR[..., ::-1] views and read-only arrays acceptable, and never aliases the caller's memory.
    copied = pixels[:, :, :3].astype(pixels.dtype.newbyteorder("="), order="C")
    return _gray_levels(torch.from_numpy(copied)).permute(2, 0, 1).expand(3, -1, -1)


def _gray_levels(pixels: Tensor) -> Tensor:
    """uint8 as it is; floats in 0..1 as the nearest of 0..255. InputError for other values."""
    if pixels.dtype == torch.uint8:
        return pixels
    pixels = pixels.float()
    low, high = (bound.item() for bound in pixels.aminmax())
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # nor with a NaN, which both bounds are then
        found = "NaN" if math.isnan(low) else f"values from {low:.8g} to {high:.8g}"
        raise InputError(f"a float image has values in 0..1, this one has {found}; divide 0..255 by 255 or pass uint8")
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8)
