"""The log of finished images, and runs of `solov2 predict` that are killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny_models import save_finder
from PIL import Image

from solov2.commands.predict import main
from solov2.errors import InputError
from solov2.prediction.finished import FinishedLog, read_finished, remove_logs, remove_temporary_files

IMAGES = 300


def run(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_finder(tmp_path_factory.mktemp("weights") / "small.pth", max_instances=3)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rectangles each: few and simple instances."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(IMAGES):
        pixels = np.full((48, 64, 3), number % 256, dtype=np.uint8)
        pixels[5 + number % 20 : 30, 10 : 20 + number % 30] = (200, 30, 90)
        (folder / f"{number % 3}").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number % 3}" / f"{number}.png")
    return folder


def test_log(tmp_path: Path) -> None:
    assert read_finished(tmp_path) is None
    for rank, names in ((0, "ac"), (1, "b")):
        log = FinishedLog(tmp_path, rank, {"weights": "w"})
        for name in names:
            log.add({"name": name, "entries": [rank]})
        log.close()
    path = tmp_path / "finished_0.jsonl"
    path.write_text(path.read_text() + '{"name": "d", "entr')  # killed
    assert {name: line["entries"] for name, [line] in (read_finished(tmp_path) or {}).items()} == {
        "a": [0], "b": [1], "c": [0]
    }  # fmt: skip
    log = FinishedLog(tmp_path, 0, {"weights": "w"})
    log.add({"name": "d"})
    log.close()
    assert sorted(read_finished(tmp_path, {"weights": "w"}) or {}) == ["a", "b", "c", "d"]
    log = FinishedLog(tmp_path, 0, {"weights": "w"})
    with pytest.raises(InputError, match="still writes"):
        FinishedLog(tmp_path, 0, {"weights": "w"})
    log.close()
    with pytest.raises(InputError, match="weights w, not other"):
        read_finished(tmp_path, {"weights": "other"})
    remove_logs(tmp_path)
    assert not list(tmp_path.iterdir())


def test_frames_count_once_their_video_is_complete(tmp_path: Path) -> None:
    log = FinishedLog(tmp_path, 0, {})
    for line in ({"name": "v", "frame": 1}, {"name": "v", "frame": 2}):
        log.add(line)
    assert read_finished(tmp_path) == {}
    for line in ({"name": "v", "frame": 1}, {"name": "v", "frames": 1}, {"name": "w", "frame": 1}):
        log.add(line)
    log.close()
    assert read_finished(tmp_path) == {"v": [{"name": "v", "frame": 1}]}


def test_temporary_files_of_killed_processes(tmp_path: Path) -> None:
    for name in (".a.png.0123abcd.tmp", ".b.png.0123abcd.tmp", ".a.png.tmp", "a.png"):
        (tmp_path / name).touch()
    remove_temporary_files([tmp_path / "a.png", tmp_path / "gone" / "c.png"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.png.tmp", ".b.png.0123abcd.tmp", "a.png"]


def test_a_run_that_was_not_completed(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is neither continued nor replaced unless asked for, and not with other arguments."""
    few = [photos / "0" / f"{number}.png" for number in (0, 3, 6)]
    arguments = (*few, "--weights", weights, "--output", tmp_path / "out", "--results", tmp_path / "found.json")
    assert run(*arguments) == 0
    complete = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    whole = json.loads((tmp_path / "found.json").read_text())
    assert run(*arguments, "--continue") == 2  # complete: nothing to resume
    assert "already exists" in capsys.readouterr().err

    settings = {"weights": str(weights)}
    log = FinishedLog(tmp_path / "out", 0, settings)
    log.add({"name": "0.png", "file_name": str(few[0]), "entries": [], "losses": {}, "height": 48, "width": 64})
    log.close()
    (tmp_path / "out" / "0.png").write_text("finished")
    (tmp_path / "out" / "3.png").write_text("not finished")
    assert run(*arguments) == 2
    assert "--continue" in capsys.readouterr().err
    assert run(*arguments, "--continue", "--weights", weights.with_name("other.pth")) == 2
    assert "other.pth" in capsys.readouterr().err
    assert run(*arguments, "--continue") == 0
    assert (tmp_path / "out" / "0.png").read_text() == "finished"
    assert (tmp_path / "out" / "3.png").read_bytes() == complete["3.png"]
    assert json.loads((tmp_path / "found.json").read_text()) == [x for x in whole if x["image_id"] > 1]
    assert run(*arguments, "--overwrite") == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == complete
    assert json.loads((tmp_path / "found.json").read_text()) == whole


def count_lines(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("finished_*.jsonl"))


def kill_all(process: int) -> int:
    """Kill a process and its descendants at once, torchrun's workers among them; returns how many there were."""
    family = [process]
    for parent in family:
        for path in Path("/proc").glob(f"{parent}/task/*/children"):
            family += [int(word) for word in path.read_text().split()]
    for member in family:
        os.kill(member, signal.SIGKILL)
    return len(family)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("count", "kills"), [(24, [8]), pytest.param(IMAGES, [60, 150], marks=pytest.mark.slow, id="300 images")]
)
def test_two_processes_killed_and_resumed(
    count: int, kills: list[int], weights: Path, photos: Path, tmp_path: Path, repo_root: Path
) -> None:
    """The union of runs on two processes that are killed, and of the last, is what one run writes."""
    few = sorted(photos.rglob("*.png"), key=lambda path: int(path.stem))[:count]
    shared: list[Any] = [*few, "--weights", weights, "--device", "cpu", "--format", "pictures,yolo,coco"]
    assert run(*shared, "--output", tmp_path / "one", "--results", tmp_path / "one.json") == 0

    out = tmp_path / "out"
    command = [sys.executable, "-m", "solov2", "predict", *shared, "--output", out, "--results", tmp_path / "out.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo_root)}
    for finished in kills:
        process = subprocess.Popen(
            [*map(str, command), "--nproc", "2", "--continue"],
            cwd=repo_root, env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while count_lines(out) < finished and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert kill_all(process.pid) >= 3 and process.wait() == -signal.SIGKILL
    before = count_lines(out)
    assert kills[-1] <= before < count and not (tmp_path / "out.json").exists()
    done = subprocess.run(
        [*map(str, command), "--nproc", "2", "--continue"],
        cwd=repo_root, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" -> ") <= count - before + 6  # what was finished is not predicted again
    assert len(json.loads((tmp_path / "one.json").read_text())) > 0
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    assert contents(out) == contents(tmp_path / "one")
