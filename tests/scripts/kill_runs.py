"""Kills a training run again and again and compares its end with that of a run left alone.

    python tests/scripts/kill_runs.py FOLDER [--kills 30] [--processes 1] [--seconds 2 12] [-- words for train.py]

The same run is trained twice: undisturbed, and with `kill -9` for it and all its children at random moments, every
third time as soon as a checkpoint is being written. After each kill the run goes on with `--resume`. At the end
everything in both last checkpoints has to be equal to the bit. Without words the run is tests/tiny_runs.py's with two
workers, several scales, flips, accumulation 2 and averaged weights. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny_runs import arguments  # noqa: E402

from solov2.checkpoint import load_file  # noqa: E402

OPTIONS = (
    "data.workers=2", "data.train_scales=[64,56]", "data.flip_probability=0.5", "data.dihedral=false",
    "data.shapes_train=48", "train.accumulate=2", "train.ema_decay=0.9", "train.checkpoint_steps=1",
    "train.batch_size=2", "train.epochs=6", "train.evaluate_every=3",
)  # fmt: skip


def tiny_words(folder: Path) -> list[str]:
    """The command line of the small run, without its output folder."""
    words = arguments(folder / "shapes", folder / "unused")
    at = words.index("--output")
    return [*words[:at], *words[at + 2 :], *(word for option in OPTIONS for word in ("--set", option))]


def start(words: list[str], output: Path, processes: int, *, resume: bool) -> subprocess.Popen:
    """Training in a process group of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "train.py"), *words]
    command += ["--output", str(output), *(["--resume"] if resume else [])]
    log = open(output.with_suffix(".log"), "a")  # noqa: SIM115 (the child writes it)
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def resident_mib(group: int) -> float:
    """Resident memory of the group's largest process."""
    sizes = [0.0]
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if os.getpgid(int(status.parent.name)) == group:
                line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
                sizes.append(int(line.split()[1]) / 1024)
        except (OSError, StopIteration):
            continue
    return max(sizes)


def kill_group(process: subprocess.Popen) -> None:
    """kill -9 for the process and all its children, loaders and ranks of torchrun (sessions of their own) included."""
    children = subprocess.run(["pgrep", "-f", "train.py"], capture_output=True, text=True).stdout.split()
    mine = [int(pid) for pid in children if descends(int(pid), process.pid)]
    for pid in [process.pid, *mine]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def descends(pid: int, ancestor: int) -> bool:
    """Whether a process stems from another."""
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False


def wait_for_the_moment(
    process: subprocess.Popen, output: Path, seconds: float, *, at_saving: bool
) -> tuple[bool, float]:
    """(whether it is time to kill, largest resident memory); False where the run ended by itself."""
    begin, memory = time.monotonic(), 0.0
    while process.poll() is None:
        memory = max(memory, resident_mib(process.pid))
        late = time.monotonic() - begin >= seconds
        if late and (not at_saving or any(output.glob(".step_*.tmp"))):
            return True, memory
        time.sleep(0.002 if late else 0.05)
    return False, memory


def differences(first: Any, second: Any, name: str = "") -> list[str]:
    """Names of what differs between two checkpoints."""
    if isinstance(first, torch.Tensor):
        return [] if torch.equal(first, second) else [name]
    if isinstance(first, dict):
        return [
            x
            for key in first.keys() | second.keys()
            for x in differences(first.get(key), second.get(key), f"{name}.{key}")
        ]
    if isinstance(first, (list, tuple)):
        return [x for i, pair in enumerate(zip(first, second, strict=True)) for x in differences(*pair, f"{name}.{i}")]
    return [] if first == second else [name]


def main() -> int:
    """Print the kills, the memory and what differs; exit code 1 where anything does."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, nargs=2, default=(2, 12), metavar=("LOW", "HIGH"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("words", nargs="*")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    words, moments = args.words or tiny_words(args.folder), random.Random(args.seed)
    whole, killed = args.folder / "whole", args.folder / "killed"
    begin = time.monotonic()
    if not (whole / "last.pth").exists():
        process = start(words, whole, args.processes, resume=False)
        _, memory = wait_for_the_moment(process, whole, 1e9, at_saving=False)
        if process.returncode:
            raise SystemExit(f"the undisturbed run failed, see {whole.with_suffix('.log')}")
        print(json.dumps({"undisturbed_seconds": round(time.monotonic() - begin, 1), "resident_mib": round(memory)}))
    kills, memories, done = 0, [], False
    while not done:
        process = start(words, killed, args.processes, resume=any(killed.glob("*.pth")))
        at_saving, seconds = kills % 3 == 0, moments.uniform(*args.seconds)
        alive, memory = wait_for_the_moment(
            process, killed, seconds if kills < args.kills else 1e9, at_saving=at_saving
        )
        memories.append(round(memory))
        if alive:
            kill_group(process)
            kills += 1
            if not any(killed.glob("*.pth")) and killed.exists():  # killed before the first checkpoint: anew
                for path in sorted(killed.rglob("*"), reverse=True):
                    path.unlink()
                killed.rmdir()
        elif process.returncode:
            raise SystemExit(f"a resumed run failed, see {killed.with_suffix('.log')}")
        done = not alive
    first, second = (load_file(folder / "last.pth") for folder in (whole, killed))
    different = differences(first, second)
    print(json.dumps({"kills": kills, "processes": args.processes, "different": different,
                      "seconds": round(time.monotonic() - begin, 1), "resident_mib_per_start": memories}))  # fmt: skip
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
