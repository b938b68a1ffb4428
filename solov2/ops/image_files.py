"""Image files: finding them in folders, opening them without decoding, and saying why one cannot be read."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import stat
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from solov2.errors import InputError, count

LOG = logging.getLogger(__name__)

ImageSource = str | os.PathLike[str] | bytes | BinaryIO  # a path, or the contents of a file

MAX_PIXELS = 178_956_970  # twice Image.MAX_IMAGE_PIXELS, where Pillow itself stops: 512 MiB of RGB
_UNREADABLE = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")  # Pillow leaves their decoding to other programs
_OTHER_CONTENTS = {  # what a file may be that Pillow cannot open: the pattern that its first bytes match
    "it is empty": rb"\Z",
    "it is a Git LFS pointer; fetch the image with git lfs pull": rb"version https://git-lfs",
    "it is HEIC; convert it to JPEG": rb".{4}ftyp(?:hei|hev|mif1|msf1)",
    "it is AVIF, which needs Pillow 11.3 or newer": rb".{4}ftypavi",
    "it is a video; extract its frames first": rb".{4}ftyp|.{4}moov|RIFF.{4}AVI |\x1a\x45\xdf\xa3",
    "it is a JPEG XL image; convert it to JPEG": rb"\xff\x0a|.{4}JXL ",
    "it is a PDF document; convert its pages to PNG": rb"%PDF",
    "it is HTML, XML or SVG": rb"(?:\xef\xbb\xbf)?\s*<[!?a-zA-Z]",
    "it is an archive; unpack it first": rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!",
}
_TIFF = rb"II[*+]\0|MM\0[*+]"
_SAMPLE_FORMATS = {1: "unsigned integers", 2: "signed integers", 3: "floats", 5: "complex", 6: "complex"}


def find_images(folder: str | os.PathLike[str]) -> list[Path]:
    """Find the image files in a folder and its subfolders by their extension, upper or lower case.

    Links to folders are followed. Files and folders whose name starts with a dot are left out. The number of files
    that are not images is logged.

    Returns:
        The files whose extension belongs to a format that Pillow reads, sorted by path.

    Raises:
        InputError: the folder does not exist, is not a folder, or contains no images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"folder {folder} {'is not a folder' if folder.exists() else 'does not exist'}")
    suffixes, found, skipped = image_suffixes(), [], Counter[str]()
    visited = set()  # links may form circles
    for place, subfolders, files in os.walk(folder, followlinks=True, onerror=_warn_unreadable_folder):
        real = os.path.realpath(place)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for path in [Path(place, name) for name in files if not name.startswith(".")]:
            if path.suffix.lower() in suffixes:
                found.append(path)
            else:
                skipped[path.suffix.lower() or "without extension"] += 1
    if skipped:
        kinds = ", ".join(f"{number} {suffix}" for suffix, number in skipped.most_common(8))
        LOG.info("%s: skipped %s without the extension of an image (%s)", folder, count(skipped.total(), "file"), kinds)
    if not found:
        raise InputError(f"folder {folder} contains no images: no file has the extension of an image format")
    return sorted(found)


def _warn_unreadable_folder(error: OSError) -> None:
    LOG.warning("folder %s is left out: %s", error.filename, error.strerror)


def image_suffixes() -> set[str]:
    """The extensions of the formats that Pillow decodes without external programs, in lower case, with the dot."""
    formats = Image.registered_extensions()  # loads Pillow's plugins, which fills Image.OPEN
    readable = {*Image.OPEN, "MPO"} - {*_UNREADABLE}  # MPO is opened as JPEG
    return {suffix for suffix, kind in formats.items() if kind in readable}


@contextlib.contextmanager
def open_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Iterator[ImageFile.ImageFile]:
    """Open an image file with Pillow, without decoding it.

    Args:
        source: a path, the contents of a file, or a file opened in binary mode, which is read from its start.
        max_pixels: maximum width x height. A value above Pillow's own limit raises that limit for the whole process.

    Raises:
        InputError: the file is missing, too large, damaged, or of an unsupported format, or the `with` block
            raised an exception, since decoders raise exceptions of all kinds on damaged files; the message names the
            file.
        TypeError: a file opened in text mode.
    """
    name, file = _named_file(source)
    try:
        with _quiet(), _open(file, max_pixels) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise InputError(f"image {name} has {width} x {height} pixels, {_limit(max_pixels)}")
            if image.format in _UNREADABLE:
                raise InputError(f"image {name} has the unsupported format {image.format}; convert it to PNG or JPEG")
            if image.format == "TIFF" and _is_stack(image):
                pages = getattr(image, "n_frames", 2)
                raise InputError(f"image {name} has {pages} pages; save the one to use as a file of its own")
            yield image
    except InputError as error:
        raise error if name in str(error) else InputError(f"image {name}: {error}") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"image {name}: too many pixels, {_limit(max_pixels)} ({error})") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ... on damaged files
        raise InputError(f"image {name} cannot be read: {_reason(error, file)}") from error


def _limit(max_pixels: int) -> str:
    return f"more than the maximum of {max_pixels} set by data.max_image_pixels"


def _open(file: str | BinaryIO, max_pixels: int) -> ImageFile.ImageFile:
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = -(-max_pixels // 2)  # not reset: another thread may be opening an image, too
    return Image.open(file)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what Pillow warns of: large images, about which `max_pixels` decides, and corrupt EXIF, which is ignored."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _named_file(source: ImageSource) -> tuple[str, str | BinaryIO]:
    """A name for messages, and what Pillow takes. Raises InputError for a path that is not a file."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"of {count(len(source), 'byte')}", io.BytesIO(source)
    if isinstance(source, (str, os.PathLike)):
        check_file(source)
        return os.fspath(source), os.fspath(source)
    if isinstance(source, io.TextIOBase):
        raise TypeError("an image file must be opened in binary mode, not in text mode")
    return str(getattr(source, "name", type(source).__name__)), source


def check_file(path: str | os.PathLike[str]) -> None:
    """Check that a path is a regular file: opening a FIFO would block.

    Raises:
        InputError: it is missing, a folder, a device, a URL, ...
    """
    text = os.fspath(path)
    name = text if len(text) <= 1000 else f"{text[:100]}... ({len(text)} characters)"
    try:
        mode = os.stat(text).st_mode
    except (OSError, ValueError) as error:  # ValueError: a name with NUL
        if re.match(r"[A-Za-z][\w+.-]+:/|data:", text):
            raise InputError(f"image {name} is a URL; download it first, and pass the file or its bytes") from None
        if "\0" not in text and os.path.islink(text):
            raise InputError(f"image {name} is a link to {os.readlink(text)}, which does not exist") from None
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise InputError(f"image {name} does not exist") from None
        raise InputError(f"image {name} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if stat.S_ISDIR(mode):
        raise InputError(f"{name} is a folder, not an image; solov2.find_images lists the images in it")
    if not stat.S_ISREG(mode):
        raise InputError(f"image {name} is not a regular file")


def _is_stack(image: Any) -> bool:
    """Whether a TIFF has a second page of its own, not only thumbnails, overviews and masks of the first."""
    try:
        for page in range(1, 2**32 if image.is_animated else 0):
            image.seek(page)
            if not int(image.tag_v2.get(254, 0)) & 0b101:  # NewSubfileType: reduced resolution, transparency mask
                return True
    except Exception:  # EOFError at the end; others where pages are damaged, which the first need not be
        return False
    finally:
        image.seek(0)
    return False


def _reason(error: Exception, file: str | BinaryIO) -> str:
    """Why an image cannot be read."""
    if isinstance(error, UnidentifiedImageError):
        return _describe_contents(file)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "not enough memory"
    return f"it may be damaged or truncated ({error})"


def _describe_contents(file: str | BinaryIO) -> str:
    """What a file is that Pillow cannot identify."""
    with contextlib.suppress(Exception), _quiet(), contextlib.ExitStack() as stack:
        stream = stack.enter_context(open(file, "rb")) if isinstance(file, str) else file
        stream.seek(0)
        head = stream.read(64)
        if re.match(_TIFF, head):
            return _describe_tiff(stream)
        for words, pattern in _OTHER_CONTENTS.items():
            if re.match(pattern, head, re.DOTALL):
                return words
    return "it is of no format that Pillow reads, or it is damaged or truncated"


def _describe_tiff(stream: BinaryIO) -> str:
    stream.seek(0)
    tags = TiffImagePlugin.ImageFileDirectory_v2(stream.read(8))
    stream.seek(tags.next)
    tags.load(stream)
    if 256 not in tags:
        raise ValueError("no ImageWidth: damaged")
    bands, bits = tags.get(277, 1), tags.get(258, (1,))[0]
    numbers = _SAMPLE_FORMATS.get(tags.get(339, (1,))[0], "unknown samples")
    return (
        f"it is a TIFF of {count(bands, 'band')} of {bits}-bit {numbers}, which Pillow cannot decode; "
        "save it as an 8-bit RGB image"
    )
