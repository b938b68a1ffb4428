"""Images from paths, PIL, arrays and tensors as RGB uint8 tensors.

Files come from anywhere, so the size is read from the header before any pixel is decoded, and every mode that Pillow
can open is either converted to RGB by an explicit rule or rejected with a clear message.
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

TOLERANCE = 1e-3  # for float images: resizing may push values slightly outside 0..1
_DEEP_GRAY_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # one 16-bit channel; older Pillow opens it as "I"
_UNSUPPORTED_MODES = ("F", "LAB")  # floats have no fixed range, and Pillow does not convert LAB
_EXTERNAL_FORMATS = ("EPS", "WMF")  # formats that Pillow passes to another program
_NOT_UPRIGHT = range(2, 9)  # EXIF orientations
_VIA = {"P": "RGBA", "PA": "RGBA", "RGBa": "RGBA", "La": "LA"}  # intermediate modes where RGB directly fails or warns


def read_image(path: str | Path, *, apply_exif: bool, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode one image file.

    Args:
        path: any file Pillow opens; of an animation, the first frame is read.
        apply_exif: apply the EXIF orientation. Right for users' photographs, wrong for datasets, whose annotations
            were drawn on the stored pixels.
        max_pixels: maximum width x height; larger files are rejected before decoding. Pillow itself stops at twice
            `MAX_PIXELS`, whatever the value here.

    Returns:
        uint8 [3, H, W], RGB; a view of channels-last memory, which resizing reads fastest.

    Raises:
        InputError: the file is missing, damaged, truncated, too large or has an unsupported format.
    """
    with _open_image(Path(path), max_pixels) as image:
        return pil_to_tensor(ImageOps.exif_transpose(image) if apply_exif else image)


class ImageHeader(NamedTuple):
    """Properties of an image file that are supported before any pixel is decoded."""

    height: int
    width: int
    mode: str  # Pillow's: RGB, L, CMYK, ...
    deep: bool  # more than eight bits per channel
    turned: bool  # EXIF orientation is not upright


def read_header(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Size and pixel format of an image file; `max_pixels` and errors as in `read_image`."""
    with _open_image(Path(path), max_pixels) as image:
        raw_mode = str(image.tile[0][3]) if image.tile else ""  # "RGB;16B" for 16-bit RGB, which Pillow opens as RGB
        return ImageHeader(
            height=image.height,
            width=image.width,
            mode=image.mode,
            deep=image.mode in _DEEP_GRAY_MODES or ";16" in raw_mode,
            turned=image.getexif().get(0x0112) in _NOT_UPRIGHT,
        )


@contextlib.contextmanager
def _open_image(path: Path, max_pixels: int) -> Iterator[ImageFile.ImageFile]:
    """Open a file with Pillow without decoding it; errors inside the block become an InputError that names it."""
    try:
        if not path.is_file():
            raise InputError(f"image {path} does not exist or is not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides
            image = Image.open(path)
        with image:
            width, height = image.size
            if width * height > max_pixels:
                raise InputError(f"image {path} has {width} x {height} pixels, more than the {max_pixels} allowed")
            if image.format in _EXTERNAL_FORMATS:
                raise InputError(f"image {path} has the unsupported format {image.format}; convert it to PNG or JPEG")
            yield image
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"image {path}: {error}") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"image {path}: too many pixels, more than the {max_pixels} allowed ({error})") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ... on damaged files
        raise InputError(f"image {path} cannot be read; it may be damaged or truncated ({error})") from error


def pil_to_tensor(image: Image.Image) -> Tensor:
    """Convert a PIL image to RGB, ignoring its EXIF orientation.

    Gray is repeated. Alpha is dropped, not composited: colors stay as stored, as in cv2.imread. 16-bit gray keeps its
    upper eight bits (mode "I" is read as 16 bits). CMYK and palette images are converted by Pillow.

    Returns:
        uint8 [3, H, W]; a view of channels-last memory.

    Raises:
        InputError: the mode is not supported (float or LAB).
    """
    if image.mode in _UNSUPPORTED_MODES:
        raise InputError(f"pixel format {image.mode} is not supported; convert the image to RGB first")
    if image.mode in _DEEP_GRAY_MODES:
        gray = np.clip(np.array(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return torch.from_numpy(gray).expand(3, -1, -1).clone()
    rgb = image if image.mode == "RGB" else image.convert(_VIA.get(image.mode, image.mode)).convert("RGB")
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def to_rgb_tensor(image: str | Path | Image.Image | np.ndarray | Tensor) -> Tensor:
    """Convert any image that `SOLOv2.predict` takes to uint8 [3, H, W] in RGB.

    Args:
        image: a path (EXIF orientation applied); a PIL image (EXIF orientation ignored); an array [H, W], [H, W, 1],
            [H, W, 3] or [H, W, 4], in RGB order, alpha dropped; a tensor [3, H, W] or [1, H, W]. Arrays and tensors are
            uint8, or float (16, 32 or 64 bits) in 0..1, rounded to the nearest of 256 levels: uint8 / 255 is restored
            exactly.

    Raises:
        TypeError: an image of an unsupported type.
        InputError: unsupported dtype or shape, no pixels, floats outside 0..1, or a file that cannot be read.
    """
    if isinstance(image, (str, Path)):
        return read_image(image, apply_exif=True)
    if isinstance(image, Image.Image):
        return pil_to_tensor(image)
    if isinstance(image, np.ndarray):
        return _array_to_tensor(image)
    if not isinstance(image, Tensor):
        raise TypeError(f"an image must be a path, a PIL image, an array or a tensor, not {type(image).__name__}")
    supported = image.dtype == torch.uint8 or image.is_floating_point()
    if not supported or image.ndim != 3 or image.shape[0] not in (1, 3) or image.numel() == 0:
        raise InputError(
            "an image tensor must be uint8, or float with values in 0..1, of shape [3, H, W] in RGB order, "
            f"not {image.dtype} {list(image.shape)}"
        )
    return _to_uint8(image).expand(3, -1, -1)


def _array_to_tensor(array: np.ndarray) -> Tensor:
    pixels = array[:, :, None] if array.ndim == 2 else array
    supported = pixels.dtype.type in (np.uint8, np.float16, np.float32, np.float64)  # in either byte order
    if not supported or pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or pixels.size == 0:
        raise InputError(
            "an image array must be uint8, or float with values in 0..1, of shape [H, W, 3] in RGB order, "
            f"not {array.dtype} {list(array.shape)}"
        )
    # Copied: torch takes neither BGR[..., ::-1] views nor read-only arrays, and must not share the caller's memory.
    copied = pixels[:, :, :3].astype(pixels.dtype.newbyteorder("="), order="C")
    return _to_uint8(torch.from_numpy(copied)).permute(2, 0, 1).expand(3, -1, -1)


def _to_uint8(pixels: Tensor) -> Tensor:
    """uint8 unchanged; floats in 0..1 rounded to the nearest of 0..255. Raises InputError for other values."""
    if pixels.dtype == torch.uint8:
        return pixels
    pixels = pixels.float()
    low, high = (bound.item() for bound in pixels.aminmax())
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # a NaN makes both bounds NaN and fails here, too
        found = "NaN" if math.isnan(low) else f"values from {low:.8g} to {high:.8g}"
        raise InputError(f"a float image must have values in 0..1, not {found}; divide 0..255 by 255 or pass uint8")
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8)
