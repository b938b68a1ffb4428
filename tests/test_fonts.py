"""Fonts for class names: which are taken, what is missing, and that labels are written with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

import solov2.ops.fonts as fonts
from solov2.ops.fonts import drawable, find_fonts, load_font
from solov2.visualize import draw_instances


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    find_fonts.cache_clear()
    yield
    find_fonts.cache_clear()


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """A system whose fonts (file name -> characters beside ASCII) a test fills in."""
    found: dict[str, str] = {}
    ascii_only = set(map(chr, range(32, 127)))
    monkeypatch.setattr(fonts, "_font_files", lambda: [tmp_path / name for name in found])
    monkeypatch.setattr(fonts, "_missing_in_file", lambda path, wanted: wanted - ascii_only - set(found[path.name]))
    return found


def test_each_name_has_a_font_with_its_characters(system: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    system.update({"latin.ttf": "Äñ", "cyrillic.ttf": "велосипд", "cjk.ttc": "自転車Ä"})
    chosen = find_fonts(("cat", "Äpfel", "велосипед", "自転車", "車Ä"))
    files = {name: path and path.name for name, path in chosen.items()}
    assert files == {
        "cat": None,
        "Äpfel": "latin.ttf",
        "велосипед": "cyrillic.ttf",
        "自転車": "cjk.ttc",
        "車Ä": "cjk.ttc",
    }
    assert not caplog.records


def test_missing_characters_are_named_once(system: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    system["latin.ttf"] = "Äñ"
    names = ("Ä車", "niño", "車転")
    for _ in range(3):
        assert {name: path and path.name for name, path in find_fonts(names).items()} == {
            "Ä車": "latin.ttf",  # lacks one character instead of two
            "niño": "latin.ttf",
            "車転": None,
        }
    (record,) = caplog.records
    assert {c for c in record.getMessage() if ord(c) > 127} == {"車", "転"}


def test_a_thousand_missing_characters_make_a_short_warning(
    system: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    find_fonts(("".join(map(chr, range(0x4E00, 0x4E00 + 1000))),))
    assert "1,000 characters" in caplog.text and len(caplog.records[0].getMessage()) < 400


def test_names_in_ascii_look_for_no_font(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_font_files", lambda: pytest.fail("the system's fonts were searched"))
    assert find_fonts(("traffic light", "it's 50%")) == {"traffic light": None, "it's 50%": None}


def test_files_are_ordered_and_damaged_ones_are_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a-bold.ttf", "b-Regular.otf", "sub/DejaVuSans.ttf", "notes.txt"):
        (tmp_path / name).write_bytes(b"no font")
    monkeypatch.setattr(fonts, "FOLDERS", (str(tmp_path), str(tmp_path / "none")))
    assert [path.name for path in fonts._font_files()] == ["DejaVuSans.ttf", "b-Regular.otf", "a-bold.ttf"]
    assert find_fonts(("Ä",)) == {"Ä": None}


def test_missing_glyphs_are_recognized() -> None:
    own = ImageFont.load_default(24)
    assert fonts._missing(own, set("aZ5 _-\u200d")) == set()
    assert fonts._missing(own, set("aÄ車é")) == set("Ä車é")


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("A\u0308pfel", "Äpfel"),  # decomposed, as macOS writes it
        ("two\nlines\t here", "two lines here"),
        ("\x1b[31mred\x00", "[31mred"),
        ("lone \ud800", "lone "),
        ("می\u200cخواهم", "می\u200cخواهم"),  # the joiner between Persian letters stays
    ],
)
def test_drawable(name: str, written: str) -> None:
    assert drawable(name) == written


def test_labels_are_written_with_the_fonts_of_the_system() -> None:
    """With the real fonts of this machine: a label of letters with an accent, not of two equal boxes."""
    path = find_fonts(("Ä",))["Ä"]
    if path is None:
        pytest.skip("no font of this system has an Ä")
    assert load_font(path, 30).getmask("Ä").getbbox() != load_font(path, 30).getmask(fonts.UNASSIGNED).getbbox()
    image, mask = np.full((200, 300, 3), 120, np.uint8), torch.zeros(1, 200, 300, dtype=torch.bool)
    mask[0, 100:150, 100:200] = True
    result = {"labels": torch.tensor([0]), "masks": mask}
    accented, other = (draw_instances(image, result, [name]).tobytes() for name in ("Ä", "Ö"))
    assert accented != other
    assert draw_instances(image, result, ["A\u0308"]).tobytes() == accented


def test_odd_names_do_not_stop_the_drawing() -> None:
    image, mask = Image.new("RGB", (60, 40)), torch.ones(1, 40, 60, dtype=torch.bool)
    for name in ("", "a\nb", "Ä\nb", "\x00", "\ud800", "x" * 5000, "車" * 300):
        picture = draw_instances(image, {"labels": torch.tensor([0]), "masks": mask}, [name])
        assert picture.size == (60, 40)
