"""Images from files, PIL, arrays and tensors as RGB uint8 tensors.

Files come from anywhere, so the size is read from the header before any pixel is decoded, and every mode that Pillow
can open is either converted to RGB by an explicit rule or rejected with a clear message.
"""

from __future__ import annotations

import logging
import math
import os
from typing import NamedTuple, TypeGuard

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor

from solov2.errors import InputError
from solov2.ops.image_files import MAX_PIXELS, ImageSource, open_image

LOG = logging.getLogger(__name__)

ImageLike = ImageSource | Image.Image | np.ndarray | Tensor  # what `SOLOv2.predict` takes

TOLERANCE = 1e-3  # for float images: resizing may push values slightly outside 0..1
_CHUNK_PIXELS = 2**22  # converted to RGB at a time; a photograph of 4 megapixels in one piece
_DEEP_GRAY_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # one 16-bit channel; some formats are opened as "I"
_UNSUPPORTED_MODES = ("F", "LAB")  # floats have no fixed range, and Pillow does not convert LAB
_VIA = {"P": "RGBA", "PA": "RGBA", "RGBa": "RGBA", "La": "LA"}  # intermediate modes where RGB directly fails or warns
_ANIMATIONS = ("AVIF", "DCX", "FLI", "GIF", "PNG", "WEBP")  # frames of a PSD are layers, those of an MPO previews
_UPRIGHT = {  # EXIF orientation -> what turns the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_HINT = "; pass the images of a batch as a list"


def read_image(source: ImageSource, *, apply_exif: bool, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode one image file.

    Beside the decoded image this needs three bytes per pixel, for the result.

    Args:
        source: path, contents or open file of any format that Pillow decodes by itself. Of an animation, the first
            frame is read; a TIFF of several pages is rejected, because no page is the image.
        apply_exif: apply the EXIF orientation, if it can be read. Right for users' photographs, wrong for datasets,
            whose annotations were drawn on the stored pixels. (Pillow always applies the orientation of a TIFF.)
        max_pixels: maximum width x height; larger files are rejected before decoding.

    Returns:
        uint8 [3, H, W], RGB; a view of channels-last memory, which resizing reads fastest.

    Raises:
        InputError: the file is missing, damaged, truncated, too large or has an unsupported format.
    """
    with open_image(source, max_pixels=max_pixels) as image:
        return _decode_upright(image) if apply_exif else pil_to_tensor(image)


def _decode_upright(image: Image.Image) -> Tensor:
    image.load()  # may find EXIF at the end of the file, and applies the orientation of a TIFF
    turn = _UPRIGHT.get(_orientation(image))
    return pil_to_tensor(image if turn is None else image.transpose(turn))


class ImageHeader(NamedTuple):
    """Properties of an image file that are known before any pixel is decoded."""

    height: int
    width: int
    mode: str  # Pillow's: RGB, L, CMYK, ...
    deep: bool  # more than eight bits per channel
    turned: bool  # EXIF orientation is not upright
    animated: bool  # has frames after the first


def read_header(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Size and pixel format of an image file; arguments and errors as in `read_image`."""
    with open_image(source, max_pixels=max_pixels) as image:
        return ImageHeader(
            height=image.height,
            width=image.width,
            mode=image.mode,
            deep=is_deep(image),
            turned=image.format != "TIFF" and _orientation(image) in _UPRIGHT,
            animated=_is_animated(image),
        )


def is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether an opened file that is not yet decoded has more than eight bits per channel."""
    raw_mode = str(image.tile[0][3]) if image.tile else ""  # "RGB;16B" for 16-bit RGB, which Pillow opens as RGB
    return image.mode in _DEEP_GRAY_MODES or ";16" in raw_mode


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, upright, if there is none or it cannot be read."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # depends on how the EXIF is damaged; the pixels are not affected
        return 1


def _is_animated(image: Image.Image) -> bool:
    try:
        return image.format in _ANIMATIONS and bool(getattr(image, "is_animated", False))
    except Exception:  # the second frame of a GIF is damaged, the first need not be
        return True


def pil_to_tensor(image: Image.Image) -> Tensor:
    """Convert a PIL image to RGB, ignoring its EXIF orientation.

    Gray is repeated. Alpha is dropped, not composited: colors stay as stored, as in cv2.imread. 16-bit gray keeps its
    upper eight bits (mode "I" is read as 16 bits, except from files, where it means 32). CMYK and palette images are
    converted by Pillow.

    Returns:
        uint8 [3, H, W]; a view of channels-last memory.

    Raises:
        InputError: the mode is not supported (float, LAB, 32-bit integers), or there are no pixels.
    """
    mode, file_format = image.mode, getattr(image, "format", None)
    if mode in _UNSUPPORTED_MODES or (mode == "I" and file_format not in (None, "PPM")):
        name = "of 32-bit or signed integers" if mode == "I" else mode
        raise InputError(f"pixel format {name} is not supported; convert the image to 8-bit RGB first")
    if not image.width or not image.height:
        raise InputError(f"an image must have pixels, not {image.width} x {image.height}")
    image.load()
    pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    rows = max(1, _CHUNK_PIXELS // image.width)
    for top in range(0, image.height, rows):  # Pillow's conversions, and numpy's copies of them, take 8 bytes per pixel
        bottom = min(top + rows, image.height)
        whole = bottom - top == image.height
        pixels[top:bottom] = _to_rgb(image if whole else image.crop((0, top, image.width, bottom)))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _to_rgb(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3], or [H, W, 1] for deep gray."""
    if image.mode in _DEEP_GRAY_MODES:
        return np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)[:, :, None]
    return np.asarray(image if image.mode == "RGB" else image.convert(_VIA.get(image.mode, image.mode)).convert("RGB"))


def is_image(value: object) -> TypeGuard[ImageLike]:
    """Whether a value is of a type that counts as one image, not as several."""
    kinds = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray, Tensor)
    return isinstance(value, kinds) or hasattr(value, "read")


def not_an_image(value: object) -> TypeError:
    """The error for a value of another type."""
    return TypeError(
        "an image must be a path, bytes, a file opened in binary mode, a PIL image, an array or a tensor, "
        f"not {type(value).__name__}"
    )


def to_rgb_tensor(image: ImageLike, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Convert any image that `SOLOv2.predict` takes to uint8 [3, H, W] in RGB.

    Args:
        image: a path, the contents of an image file (bytes), or a file opened in binary mode (EXIF orientation applied;
            the first frame of an animation, with a warning); a PIL image (EXIF orientation ignored); an array [H, W],
            [H, W, 1], [H, W, 3] or [H, W, 4], in RGB order, alpha dropped; a tensor [3, H, W] or [1, H, W]. Arrays and
            tensors are uint8, or float (16, 32 or 64 bits) in 0..1, rounded to the nearest of 256 levels: uint8 / 255
            is restored exactly.
        max_pixels: maximum width x height of a file.

    Raises:
        TypeError: an image of an unsupported type.
        InputError: unsupported dtype or shape, no pixels, floats outside 0..1, or a file that cannot be read.
    """
    if isinstance(image, Image.Image):
        return _decode_pil(image)
    if isinstance(image, np.ndarray):
        return _array_to_tensor(image)
    if isinstance(image, Tensor):
        return _tensor_to_rgb(image)
    if not is_image(image):
        raise not_an_image(image)
    with open_image(image, max_pixels=max_pixels) as opened:  # type: ignore[arg-type]  # the other kinds returned
        pixels = _decode_upright(opened)
        if _is_animated(opened):  # asked last, because a GIF moves on to its second frame for it
            name = getattr(opened, "filename", "") or "in memory"
            LOG.warning("image %s is an animation, of which only the first frame is read", name)
        return pixels


def _decode_pil(image: Image.Image) -> Tensor:
    try:
        image.load()  # the image of a file may not be decoded yet
    except Exception as error:  # as in open_image
        name = getattr(image, "filename", "")
        message = f"PIL image {name} cannot be read: it may be damaged, truncated or closed ({error})"
        raise InputError(message) from error
    return pil_to_tensor(image)


def _tensor_to_rgb(image: Tensor) -> Tensor:
    supported = image.dtype == torch.uint8 or image.is_floating_point()
    stored = image.layout == torch.strided and not image.is_meta
    if not (supported and stored) or image.ndim != 3 or image.shape[0] not in (1, 3) or image.numel() == 0:
        kind = f"{image.dtype} {list(image.shape)}" if stored else f"{image.device} {image.layout}"
        raise InputError(
            "an image tensor must be uint8, or float with values in 0..1, of shape [3, H, W] in RGB order, "
            f"not {kind}{_HINT if image.ndim == 4 else ''}"
        )
    return _to_uint8(image.detach()).expand(3, -1, -1)


def _array_to_tensor(array: np.ndarray) -> Tensor:
    pixels = array[:, :, None] if array.ndim == 2 else array
    supported = pixels.dtype.type in (np.uint8, np.float16, np.float32, np.float64)  # in either byte order
    if not supported or pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or pixels.size == 0:
        raise InputError(
            "an image array must be uint8, or float with values in 0..1, of shape [H, W, 3] in RGB order, "
            f"not {array.dtype} {list(array.shape)}{_HINT if array.ndim == 4 else ''}"
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
