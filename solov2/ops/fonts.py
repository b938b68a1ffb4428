"""Fonts for class names in any script. Pillow's own font has little more than ASCII; others are the system's."""

from __future__ import annotations

import functools
import logging
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from PIL import ImageFont

from solov2.errors import count

LOG = logging.getLogger(__name__)

FOLDERS = (
    "/usr/share/fonts",  # Linux
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/System/Library/Fonts",  # macOS
    "/Library/Fonts",
    "~/Library/Fonts",
    "$WINDIR/Fonts",  # Windows
    "$LOCALAPPDATA/Microsoft/Windows/Fonts",
)
PREFERRED = (  # plain fonts with many scripts; the others follow, those called "regular" first
    "dejavusans.ttf",
    "notosans-regular.ttf",
    "arial.ttf",
    "arial unicode.ttf",
    "notosanscjk-regular.ttc",
    "pingfang.ttc",
    "msyh.ttc",
)
SCORE = "0123456789. "  # what stands beside a name in a label
CHECKED_SIZE = 24  # in pixels, at which glyphs are compared
MAX_NAMED = 20  # characters in the warning
UNASSIGNED = "\U0010ffff"  # never a character, so that every font shows its box for missing glyphs


def drawable(name: str) -> str:
    """A class name on one line: composed (NFC) and without control characters, which break font engines."""
    kept = "".join(c for c in " ".join(name.split()) if unicodedata.category(c) not in ("Cc", "Cs"))
    return unicodedata.normalize("NFC", kept)


@functools.cache
def find_fonts(names: tuple[str, ...]) -> dict[str, Path | None]:
    """The file of the font to write each name with, or None for Pillow's own font.

    A font of the system is used only if Pillow's own lacks a character. If no font has all characters of a name, the
    one that lacks the fewest is used, and a warning names the missing ones; since results are cached, it appears once
    for these names.
    """
    own = load_font(None, CHECKED_SIZE)
    chosen: dict[str, Path | None] = dict.fromkeys(names)
    missing = {name: _missing(own, drawable(name)) for name in names}
    for path in _font_files() if any(missing.values()) else ():
        open_names = [name for name in names if missing[name]]
        lacks = _missing_in_file(path, set(SCORE).union(*(drawable(name) for name in open_names)))
        for name in open_names:
            absent = lacks & set(drawable(name))
            if len(absent) < len(missing[name]) and not lacks & set(SCORE):
                chosen[name], missing[name] = path, absent
        if not any(missing.values()):
            break
    characters = sorted(set().union(*missing.values()))
    if characters:
        LOG.warning(
            f"no font of this system has {count(len(characters), 'character')} of the class names, which are drawn as "
            f"boxes: {' '.join(characters[:MAX_NAMED])}{' ...' * (len(characters) > MAX_NAMED)}; install one that does "
            "(on Debian and Ubuntu, fonts-dejavu, and fonts-noto-cjk for Chinese, Japanese and Korean)"
        )
    return chosen


def load_font(path: Path | None, size: int) -> ImageFont.FreeTypeFont:
    """A font of `find_fonts` in a size in pixels."""
    if path is not None:  # ImageFont.truetype would search the system for the name of a damaged file
        return ImageFont.FreeTypeFont(str(path), size)
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # because a size is given
    return font


def _font_files() -> list[Path]:
    """The system's font files, the most suitable first."""
    folders = [os.path.expanduser(os.path.expandvars(folder)) for folder in FOLDERS]
    files = [Path(root, name) for folder in folders for root, _, names in os.walk(folder) for name in names]
    order = {name: rank for rank, name in enumerate(PREFERRED)}

    def suitability(path: Path) -> tuple[int, bool, str]:
        name = path.name.lower()
        return order.get(name, len(order)), "regular" not in name, str(path)

    return sorted((path for path in files if path.suffix.lower() in (".ttf", ".ttc", ".otf", ".otc")), key=suitability)


def _missing_in_file(path: Path, characters: set[str]) -> set[str]:
    """The characters that a font file has no glyph for; all of them if it cannot be used."""
    try:
        # Basic layout: the other one shows a missing accent as two glyphs, which would count as something else.
        font = ImageFont.FreeTypeFont(str(path), CHECKED_SIZE, layout_engine=ImageFont.Layout.BASIC)
        return _missing(font, characters)
    except OSError:  # damaged, not readable, or a bitmap font in other sizes, as emoji are
        return set(characters)


def _missing(font: ImageFont.FreeTypeFont, characters: Iterable[str]) -> set[str]:
    """The characters for which a font shows its box for missing glyphs. Invisible ones are never missing."""

    def shape(character: str) -> tuple[tuple[int, int], bytes]:
        mask = font.getmask(character)
        return mask.size, bytes(mask)

    box = shape(UNASSIGNED)
    visible = {c for c in characters if not c.isspace() and unicodedata.category(c) != "Cf"}
    return {character for character in visible if shape(character) == box}
