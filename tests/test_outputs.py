"""Output files: problems are reported before the work starts, and files are complete or absent."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
from pathlib import Path

import pytest
from PIL import Image

from solov2.errors import InputError
from solov2.outputs import check_cleared_folder, check_outputs, replace_file, write_json, write_picture


def test_unwritable_outputs_are_reported_before_the_work(tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text("1")
    check_outputs([("--json", None)], overwrite=False)
    check_outputs([("--json", tmp_path / "new" / "folder" / "x.json")], overwrite=False)
    check_outputs([("--json", old)], overwrite=True)
    for path, message in (
        (old, r"old\.json already exists.*--json.*--overwrite"),
        (tmp_path, "is a folder"),
        (old / "x.json", r"old\.json is not a folder"),
    ):
        with pytest.raises(InputError, match=message):
            check_outputs([("--json", path)], overwrite=False)
    assert old.read_text() == "1" and list(tmp_path.iterdir()) == [old]


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_a_read_only_folder_is_reported(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="--json .*no permission"):
        check_outputs([("--json", tmp_path / "x.json")], overwrite=False)


def test_a_file_is_written_completely_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    write_json(path, [{"score": 0.25, "name": "Hände"}])
    with pytest.raises(TypeError):
        write_json(path, [{"score": object()}])
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, [{"score": float("nan")}], allow_nan=False)
    assert json.loads(path.read_text(encoding="utf-8")) == [{"score": 0.25, "name": "Hände"}]
    assert list(path.parent.iterdir()) == [path]


def test_files_respect_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_json(tmp_path / "private.json", 1)
        os.umask(0o022)
        write_json(tmp_path / "public.json", 1)
    finally:
        os.umask(before)
    assert (tmp_path / "private.json").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "public.json").stat().st_mode & 0o777 == 0o644


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: in.json, a folder d, and other names of in.json."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.json").write_text("mine")
    (tmp_path / "d").mkdir()
    os.link("in.json", "hard.json")
    os.symlink("in.json", "soft.json")
    os.symlink(tmp_path, "d/up")
    return tmp_path


@pytest.mark.parametrize(
    "name", ["in.json", "./in.json", "d/../in.json", "d/up/in.json", "hard.json", "soft.json", "{place}/in.json"]
)
def test_no_output_replaces_an_input_under_any_name(name: str, place: Path) -> None:
    output = name.format(place=place)
    for source in ("in.json", place / "in.json", "soft.json"):
        with pytest.raises(InputError, match=f"--json {output} would replace the input .*{Path(source).name}"):
            check_outputs([("--json", output)], overwrite=True, inputs=[None, "a_model", "a\0b", source])
    check_outputs([("--json", output)], overwrite=True, inputs=["d", "nowhere.json"])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a", "a"),
        ("a", "./a"),
        ("a", "d/../a"),
        ("a", "d/up/a"),
        ("a", "{place}/a"),
        ("a", "A"),  # some file systems ignore case
        ("\u00e9", "e\u0301"),  # and normalization
        ("hard.json", "soft.json"),
        ("a", "a/b"),  # a file and a folder at once
        ("x/y/a", "x"),
        ("-", "-"),
    ],
)
def test_outputs_differ_from_each_other(first: str, second: str, place: Path) -> None:
    outputs = [("--json", first), ("--results", second.format(place=place))]
    with pytest.raises(InputError, match="--results .* would replace the output of --json"):
        check_outputs(outputs, overwrite=True)
    with pytest.raises(InputError, match="--json .* would replace the output of --results"):
        check_outputs(outputs[::-1], overwrite=True)


def test_only_regular_files_and_the_null_device_are_outputs(place: Path) -> None:
    os.mkfifo("fifo")
    os.symlink("fifo", "link")
    os.symlink("/dev/null", "null.json")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        names = ("fifo", "link", "null.json", "socket", "/dev/full", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
        for name in (*names, "/proc/new.json", "/dev/new.json"):
            with pytest.raises(InputError, match=f"--json {name} is not a regular file"):
                check_outputs([("--json", name)], overwrite=True)
    for name, words in ((".", "is a folder"), ("d", "is a folder"), ("x" * 256, os.strerror(errno.ENAMETOOLONG))):
        with pytest.raises(InputError, match=words):
            check_outputs([("--fix", name)], overwrite=True)
    for name in ("a\0b", "-"):
        with pytest.raises(InputError, match="--fix .*name"):
            check_outputs([("--fix", name)], overwrite=True)
    check_outputs([("--json", "/dev/null"), ("--results", "/dev/../dev/null")], overwrite=False)
    write_json("/dev/null", 1)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and not [path for path in os.listdir("/dev") if ".null" in path]


def test_a_link_is_replaced_and_not_followed(place: Path) -> None:
    os.symlink("nowhere.json", "dangling.json")
    for name in ("soft.json", "dangling.json"):
        with pytest.raises(InputError, match=f"{name} already exists"):
            check_outputs([("--json", name)], overwrite=False)
        check_outputs([("--json", name)], overwrite=True)
        write_json(name, "new")
        assert not Path(name).is_symlink() and Path(name).read_text() == '"new"\n'
    assert Path("in.json").read_text() == "mine" and not Path("nowhere.json").exists()


def test_a_write_that_fails_names_the_file_and_keeps_the_old_one(place: Path) -> None:
    for number, path in ((errno.ENOSPC, "in.json"), (errno.EDQUOT, "new.json")):
        with pytest.raises(OSError) as caught, replace_file(path) as file:
            file.write(b"half")
            raise OSError(number, os.strerror(number))
        assert (caught.value.errno, caught.value.filename) == (number, path)
    with pytest.raises(IsADirectoryError) as caught:
        write_json("d", 1)
    assert caught.value.filename == "d"
    with pytest.raises(FileNotFoundError) as caught, replace_file("nowhere/x.json"):
        pass
    assert caught.value.filename == "nowhere/x.json"
    assert Path("in.json").read_text() == "mine"
    assert sorted(os.listdir()) == ["d", "hard.json", "in.json", "soft.json"]


def test_long_names(tmp_path: Path) -> None:
    for name in ("x" * 255, "\u732b" * 85, "\U0001f408" * 63):
        check_outputs([("--json", tmp_path / name)], overwrite=False)
        write_json(tmp_path / name, 1)
        assert (tmp_path / name).read_text() == "1\n"


def test_pictures(tmp_path: Path) -> None:
    picture = Image.new("RGB", (32, 24), (200, 20, 20))
    (tmp_path / "old.png").write_text("old")
    os.symlink("old.png", tmp_path / "link.png")
    for name, kind in (("new/a.jpg", "JPEG"), ("new/a.JPEG", "JPEG"), ("new/a.PNG", "PNG"), ("link.png", "PNG")):
        write_picture(tmp_path / name, picture)
        with Image.open(tmp_path / name) as written:
            assert (written.format, written.size) == (kind, (32, 24))
    assert (tmp_path / "old.png").read_text() == "old" and not (tmp_path / "link.png").is_symlink()
    with pytest.raises(OSError):
        write_picture(tmp_path / "old.jpg", Image.new("1", (70_000, 1)))  # too wide for a JPEG
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.png", "new", "old.png"]


def test_a_folder_that_is_cleared_contains_no_input(tmp_path: Path) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    for folder in (run, data):
        folder.mkdir()
        (folder / "best.pth").touch()
    os.symlink(data / "best.pth", run / "link.pth")
    os.symlink(run / "best.pth", data / "link.pth")
    check_cleared_folder(run, [data, data / "best.pth", run / "nowhere", "quickstart"])
    for name in (run, run / "best.pth", run / "link.pth", data / "link.pth", data / ".." / "run" / "best.pth"):
        with pytest.raises(InputError, match=f"--overwrite would delete the input {name}"):
            check_cleared_folder(run, [data, name])
