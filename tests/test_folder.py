"""The run folder: which runs may use it, its lock, and from where a run resumes."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers.tiny_models import numbered

from solov2.errors import InputError
from solov2.training.folder import LOCK_FILE, check_folder, check_ranks_agree, run_folder, save_step


def test_a_new_folder_is_free(tmp_path):
    assert check_folder(tmp_path / "runs" / "new", False, False) is None
    with run_folder(tmp_path / "runs" / "new", clear=False):
        pass
    assert check_folder(tmp_path / "runs" / "new", False, False) is None  # ended before it wrote anything


def test_clearing_deletes_everything_but_the_lock(tmp_path):
    for name in ("log.jsonl", "mine.txt", "last.pth"):
        (tmp_path / name).touch()
    (tmp_path / "events").mkdir()
    with run_folder(tmp_path, clear=False):
        assert len(list(tmp_path.iterdir())) == 5
    with run_folder(tmp_path, clear=True):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


def test_two_runs_do_not_share_a_folder(tmp_path):
    """The kernel releases the lock when the process that holds it ends, even if it is killed."""
    script = (
        "import sys, pathlib\n"
        "from solov2.training.folder import run_folder\n"
        "with run_folder(pathlib.Path(sys.argv[1]), clear=False):\n"
        "    print('open', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(InputError, match="another run is writing to"), run_folder(tmp_path, clear=True):
            pass
        other.kill()
    with run_folder(tmp_path, clear=False):
        pass


def test_without_fcntl_the_lock_is_that_of_windows(tmp_path, monkeypatch):
    calls, held = [], False

    def locking(_file, mode, length):
        calls.append((mode, length))
        if held:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("solov2.training.folder.fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this one")
    with run_folder(tmp_path, clear=False):
        assert calls == [(2, 1)] and (tmp_path / LOCK_FILE).read_text() == "this one"
    held = True
    with pytest.raises(InputError, match="another run is writing to"), run_folder(tmp_path, clear=False):
        pass
    monkeypatch.setitem(sys.modules, "msvcrt", None)
    with run_folder(tmp_path, clear=False):  # no locks at all
        pass


def test_every_module_is_imported_without_the_names_of_unix():
    """Windows has neither fcntl nor most signals."""
    script = (
        "import importlib, pkgutil, signal, subprocess, sys\n"
        "import multiprocessing.util, pycocotools.coco, torch, torchvision\n"
        "sys.modules |= dict.fromkeys(('fcntl', 'resource', 'pwd', 'grp'))\n"
        "kept = ('SIGINT', 'SIGTERM', 'SIGABRT', 'SIGFPE', 'SIGILL', 'SIGSEGV')\n"
        "for name in [n for n in dir(signal) if n[:3] == 'SIG' and n[3] != '_' and n not in kept]:\n"
        "    delattr(signal, name)\n"
        "del signal.setitimer, signal.alarm\n"
        "import solov2\n"
        "for module in pkgutil.walk_packages(solov2.__path__, 'solov2.'):\n"
        "    if module.name != 'solov2.__main__':\n"
        "        importlib.import_module(module.name)\n"
        "from solov2.training.signals import SIGNALS\n"
        "print(len(SIGNALS))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "2\n", done.stderr[-2000:]


def test_ranks_that_find_different_checkpoints_are_an_error(tmp_path, monkeypatch):
    check_ranks_agree("last.pth", tmp_path)
    monkeypatch.setattr("solov2.distributed.all_gather_objects", lambda found: [found, None])
    with pytest.raises(InputError, match=f"{tmp_path}: last.pth, None;"):
        check_ranks_agree("last.pth", tmp_path)


def test_a_restarted_worker_resumes_by_itself(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "log.jsonl").touch()
    (folder / LOCK_FILE).write_text("this one")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this one")
    with pytest.raises(InputError, match=f"{folder} .*--resume.*--overwrite"):
        check_folder(folder, False, False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert check_folder(folder, False, False) is None  # killed before its first checkpoint
    other = tmp_path / "other.pth"
    numbered(7).save(other)
    assert check_folder(folder, str(other), False).source == str(other)
    save_step(folder, 3, numbered(3), keep=2)
    last = str(folder / "last.pth")
    assert check_folder(folder, False, True).source == last  # --overwrite applies only to the first start
    assert check_folder(folder, str(other), False).source == last  # and so does the file to resume from


@pytest.mark.parametrize("name", ["another one", "none"])
def test_a_restart_does_not_resume_the_run_of_another_launch(tmp_path, monkeypatch, name):
    """torchrun also restarts workers that failed because the folder was not free."""
    save_step(tmp_path, 3, numbered(3), keep=2)
    (tmp_path / "log.jsonl").touch()
    (tmp_path / LOCK_FILE).write_text("none of process 1" if name == "none" else name)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none" if name == "none" else "this one")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(InputError, match=f"{tmp_path} .*--resume.*--overwrite"):
        check_folder(tmp_path, False, False)
    assert check_folder(tmp_path, False, True) is None
