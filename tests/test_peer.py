"""Detections on photographs against a live mmdetection, where one is installed (tests/peer/detections.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_detections_on_photographs(coco_photos: Path, repo_root: Path, tmp_path: Path) -> None:
    """Two photographs at a small size: from the files, every pixel and every detection is the reference's."""
    peer = [os.environ.get(name) for name in ("SOLOV2_PEER_DIR", "SOLOV2_PEER_PYTHON")]
    if not all(peer):
        pytest.skip("SOLOV2_PEER_DIR (folder of peer.py) and SOLOV2_PEER_PYTHON (its interpreter) are not both set")
    command = [
        *(sys.executable, repo_root / "tests/peer/detections.py", *peer),
        *("--images", coco_photos / "val2017"),
        *("--annotations", coco_photos / "annotations/instances_val2017.json"),
        *("--config", "solov2_light_r18", "--count", "2", "--size", "384", "224", "--json", tmp_path / "report.json"),
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["photos"]) == 2
    for photo in report["photos"]:
        assert photo["different_pixels"] == {"decoded": 0, "resized": 0}
        for dtype in ("float64", "float32"):
            assert photo[dtype]["same_padding"]
            assert photo[dtype]["matched"] >= 10
