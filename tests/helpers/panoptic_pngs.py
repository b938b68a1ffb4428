"""Changes to PNGs of panoptic files, for tests: most make them unusable, some are unusual but allowed."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from helpers.panoptic_files import HEIGHT, WIDTH


def save_as(**how: object) -> Callable[[Path], object]:
    """Write the PNG in another format."""
    return lambda png: Image.open(png).save(png, **how)


def convert(mode: str) -> Callable[[Path], object]:
    return lambda png: Image.open(png).convert(mode).save(png)


def replace_by(content: bytes) -> Callable[[Path], object]:
    return lambda png: png.write_bytes(content)


def write_png(png: Path, rows: list[np.ndarray], *, bits: int = 8, interlaced: bool = False) -> None:
    """Write an RGB PNG as Pillow cannot: rows [W, 3] of the image, or of the seven images of an interlaced one."""
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, 2, 0, 0, interlaced)),
        (b"IDAT", data),
        (b"IEND", b""),
    )
    packed = (struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x)) for kind, x in chunks)
    png.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


def interlace(png: Path) -> None:
    passes = (0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)
    pixels = np.array(Image.open(png))
    write_png(png, [row for y, x, dy, dx in passes for row in pixels[y::dy, x::dx]], interlaced=True)


def deepen(png: Path) -> None:
    write_png(png, [*np.array(Image.open(png)).astype(">u2")], bits=16)


def damage(png: Path) -> None:
    content = bytearray(png.read_bytes())
    content[-20] ^= 255
    png.write_bytes(content)


def exchange_red_and_blue(png: Path) -> None:
    Image.fromarray(np.array(Image.open(png))[..., ::-1].copy()).save(png)


def turn(png: Path) -> None:
    Image.open(png).transpose(Image.Transpose.TRANSPOSE).save(png)
