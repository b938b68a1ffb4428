"""Output files: problems are reported before the work starts, and files are complete or absent."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from solov2.errors import InputError
from solov2.outputs import check_outputs, write_json


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
