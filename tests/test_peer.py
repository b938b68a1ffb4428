"""Detections on photographs and panoptic maps against a live mmdetection, where one is installed (tests/peer)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def peer() -> list[str]:
    """The folder of peer.py and its interpreter."""
    found = [os.environ.get(name, "") for name in ("SOLOV2_PEER_DIR", "SOLOV2_PEER_PYTHON")]
    if not all(found):
        pytest.skip("SOLOV2_PEER_DIR (folder of peer.py) and SOLOV2_PEER_PYTHON (its interpreter) are not both set")
    return found


def run(command: list[str | Path]) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_detections_on_photographs(peer: list[str], coco_photos: Path, repo_root: Path, tmp_path: Path) -> None:
    """Two photographs at a small size: from the files, every pixel and every detection is the reference's."""
    command = [
        *(sys.executable, repo_root / "tests/peer/detections.py", *peer),
        *("--images", coco_photos / "val2017"),
        *("--annotations", coco_photos / "annotations/instances_val2017.json"),
        *("--config", "solov2_light_r18", "--count", "2", "--size", "384", "224", "--json", tmp_path / "report.json"),
    ]
    run(command)
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["photos"]) == 2
    for photo in report["photos"]:
        assert photo["different_pixels"] == {"decoded": 0, "resized": 0}
        for dtype in ("float64", "float32"):
            assert photo[dtype]["same_padding"]
            assert photo[dtype]["matched"] >= 10


@pytest.mark.slow
def test_panoptic_maps(peer: list[str], repo_root: Path, tmp_path: Path) -> None:
    """From the same logits and instances the reference makes the same map, but for labels between equal logits."""
    command = [
        *(sys.executable, repo_root / "tests/peer/compare.py", *peer),
        *("--only", "panoptic", "--photograph", "450", "601", "--rounds", "1", "--json", tmp_path / "report.json"),
    ]
    run(command)
    ((_, report),) = json.loads((tmp_path / "report.json").read_text()).items()
    same = report["same"]
    assert same["things"] > 10 and same["stuff"] > 2
    assert same["different_pixels"] < 20 and same["largest_gap"] < 1e-5 and same["run_lengths_differ"] == 0
