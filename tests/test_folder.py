"""The folder of a run: whose it is, who writes to it, and where a start goes on."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers.tiny_models import numbered

from solov2.errors import InputError
from solov2.training.folder import LAUNCH, check_agreement, check_folder, run_folder, save_step


def test_a_new_folder_is_anybodys(tmp_path):
    assert check_folder(tmp_path / "runs" / "new", False, False) is None
    with run_folder(tmp_path / "runs" / "new", emptied=False):
        pass
    assert check_folder(tmp_path / "runs" / "new", False, False) is None  # ended before it wrote anything


def test_what_overwriting_takes(tmp_path):
    for name in ("log.jsonl", "mine.txt", "last.pth"):
        (tmp_path / name).touch()
    (tmp_path / "events").mkdir()
    with run_folder(tmp_path, emptied=False):
        assert len(list(tmp_path.iterdir())) == 5
    with run_folder(tmp_path, emptied=True):
        assert [path.name for path in tmp_path.iterdir()] == [LAUNCH]


def test_two_runs_do_not_share_a_folder(tmp_path):
    """A lock of the kernel: another process holds it, and it is gone with that process, however it ends."""
    script = (
        "import sys, pathlib\n"
        "from solov2.training.folder import run_folder\n"
        "with run_folder(pathlib.Path(sys.argv[1]), emptied=False):\n"
        "    print('open', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(InputError, match="another run is writing to"), run_folder(tmp_path, emptied=True):
            pass
        other.kill()
    with run_folder(tmp_path, emptied=False):
        pass


def test_hosts_that_see_different_checkpoints_are_an_error(tmp_path, monkeypatch):
    check_agreement("last.pth", tmp_path)
    monkeypatch.setattr("solov2.distributed.all_gather_objects", lambda found: [found, None])
    with pytest.raises(InputError, match=r"different checkpoints in .*: last.pth, None; all hosts need the same"):
        check_agreement("last.pth", tmp_path)


def test_a_restarted_worker_resumes_by_itself(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "log.jsonl").touch()
    (folder / LAUNCH).write_text("this one")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this one")
    with pytest.raises(InputError, match="already holds files"):
        check_folder(folder, False, False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert check_folder(folder, False, False) is None  # killed before its first checkpoint
    other = tmp_path / "other.pth"
    numbered(7).save(other)
    assert check_folder(folder, str(other), False).source == str(other)
    save_step(folder, 3, numbered(3), keep=2)
    last = str(folder / "last.pth")
    assert check_folder(folder, False, True).source == last  # --overwrite belongs to the first start
    assert check_folder(folder, str(other), False).source == last  # and so does the file it started from


@pytest.mark.parametrize("name", ["another one", "none"])
def test_a_restart_leaves_the_run_of_another_launch_alone(tmp_path, monkeypatch, name):
    """torchrun starts its workers again after a refusal, too."""
    save_step(tmp_path, 3, numbered(3), keep=2)
    (tmp_path / "log.jsonl").touch()
    (tmp_path / LAUNCH).write_text("none of process 1" if name == "none" else name)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none" if name == "none" else "this one")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(InputError, match="already holds files"):
        check_folder(tmp_path, False, False)
    assert check_folder(tmp_path, False, True) is None
