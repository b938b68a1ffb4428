"""Kill a rank of a torchrun with --max-restarts during training, and compare the result with an undisturbed run.

    python tests/scripts/restart.py FOLDER

torchrun restarts both ranks, they resume from the last checkpoint by themselves, and the last checkpoints of both runs
must be bit-identical. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "scripts")]

from kill_runs import differences, distance, folder_argument, tiny_words  # noqa: E402

from solov2.checkpoint import load_file  # noqa: E402
from solov2.training.folder import step_checkpoints  # noqa: E402


def launch(words: list[str], output: Path) -> subprocess.Popen:
    """Start training with two ranks and up to three restarts."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *words, "--output", str(output)]
    log = open(output.with_suffix(".log"), "w")  # noqa: SIM115 (the child writes it)
    return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def worker_of(agent: subprocess.Popen) -> int:
    """Process id of rank 1 among the workers of a torchrun agent."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            pid = int(path.parent.name)
            parent = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == agent.pid and distance(pid, agent.pid) > 0 and b"\0RANK=1\0" in b"\0" + path.read_bytes():
                return pid
        except OSError:
            continue
    raise SystemExit("the process of rank 1 was not found")


def main() -> int:
    """Returns exit code 1 if the run fails, does not resume exactly once, or its checkpoint differs."""
    folder = folder_argument(__doc__)
    folder.mkdir(parents=True, exist_ok=True)
    words = tiny_words(folder)
    if launch(words, folder / "whole").wait():
        raise SystemExit(f"the undisturbed run failed, see {folder / 'whole.log'}")
    agent = launch(words, folder / "restarted")
    while agent.poll() is None and not step_checkpoints(folder / "restarted"):
        time.sleep(0.02)
    time.sleep(0.5)
    os.kill(worker_of(agent), signal.SIGKILL)
    code = agent.wait()
    first, second = (load_file(folder / name / "last.pth") for name in ("whole", "restarted"))
    resumed = (folder / "restarted.log").read_text().count("resumed ")
    different = differences(first, second)
    print(json.dumps({"exit_code": code, "times_resumed": resumed, "different": different}))
    return bool(code or different or resumed != 1)


if __name__ == "__main__":
    sys.exit(main())
