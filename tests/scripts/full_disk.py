"""Fill the disk while a run saves checkpoints: existing ones must survive, and the run must resume once there is space.

    python tests/scripts/full_disk.py FOLDER        (as root on Linux: the disk is a tmpfs of 24 MB)

Prints one JSON object: exit code and error message of the run on the full disk, the checkpoints it left, and the
differences between the last checkpoints of the resumed run and of a run with enough space.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "scripts")]

from kill_runs import differences, folder_argument, tiny_words  # noqa: E402

from solov2.checkpoint import load_file  # noqa: E402
from solov2.training.folder import step_checkpoints  # noqa: E402


def train(words: list[str], output: Path, *more: str) -> subprocess.CompletedProcess:
    """Run train.py to its end."""
    command = [sys.executable, str(ROOT / "train.py"), *words, "--output", str(output), *more]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def main() -> int:
    """Returns exit code 1 if anything was lost or differs."""
    folder = folder_argument(__doc__)
    disk = folder / "disk"
    disk.mkdir(parents=True, exist_ok=True)
    words = [*tiny_words(folder), "--set", "train.keep_checkpoints=100"]
    if train(words, folder / "whole").returncode:
        raise SystemExit("the run with enough space failed")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=True)
    try:
        full = train(words, disk / "run")
        left = {path.name: load_file(path)["step"] for path in step_checkpoints(disk / "run")}
        leftovers = [path.name for path in (disk / "run").glob(".*.tmp")]
        newest = load_file(disk / "run" / "last.pth")["step"]
        subprocess.run(["mount", "-o", "remount,size=2g", str(disk)], check=True)
        resumed = train(words, disk / "run", "--resume")
        first, second = (load_file(path / "last.pth") for path in (folder / "whole", disk / "run"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    different = differences(first, second)
    report = {
        "exit_code": full.returncode,
        "said": full.stderr.strip().splitlines()[-1],
        "left": left,
        "leftovers": leftovers,
        "newest": newest,
        "resumed": resumed.returncode,
        "different": different,
    }
    print(json.dumps(report))
    return bool(not full.returncode or leftovers or resumed.returncode or different)


if __name__ == "__main__":
    sys.exit(main())
