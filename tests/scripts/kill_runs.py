"""Kill a training run repeatedly and compare its checkpoints with those of an undisturbed run.

    python tests/scripts/kill_runs.py FOLDER [--kills 30] [--workers] [--processes 1] [--seconds 0 1]
                                      [-- arguments of train.py]

Trains the same run twice, in parallel and with one thread per process: once undisturbed, and once with `kill -9` for it
and all its children at random times. The time of a kill counts from the first checkpoint after a start; every third
kill also waits until the next checkpoint is being written, and every fifth comes while the run is still starting. After
each kill the run continues with `--resume`. At the end last.pth and best.pth of both must be bit-identical. With
`--workers` one DataLoader worker is killed instead: the run must save and end by itself, with a sentence and without a
traceback. Without arguments the run is that of tests/helpers/tiny_runs.py with two workers, several scales, flips,
accumulation 2 and a weight average; other runs should save often (`train.checkpoint_steps`). Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.tiny_runs import arguments  # noqa: E402

from solov2.checkpoint import load_file  # noqa: E402

OPTIONS = (
    "data.workers=2", "data.train_scales=[64,56]", "data.flip_probability=0.5", "data.dihedral=false",
    "data.shapes_train=48", "train.accumulate=2", "train.ema_decay=0.9", "train.checkpoint_steps=1",
    "train.batch_size=2", "train.epochs=16", "train.evaluate_every=8",
)  # fmt: skip


def folder_argument(description: str | None) -> Path:
    """Parse the command line of a script that takes only FOLDER."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder for the runs; should be empty or new")
    return parser.parse_args().folder


def tiny_words(folder: Path) -> list[str]:
    """The arguments of the tiny run, without --output."""
    words = arguments(folder / "shapes", folder / "unused")
    at = words.index("--output")
    return [*words[:at], *words[at + 2 :], *(word for option in OPTIONS for word in ("--set", option))]


def start(words: list[str], output: Path, processes: int, *, resume: bool) -> subprocess.Popen:
    """Start training in a new session."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "train.py"), *words]
    command += ["--output", str(output), *(["--resume"] if resume else [])]
    log = open(output.with_suffix(".log"), "a")  # noqa: SIM115 (the child writes it)
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def resident_mib(group: int) -> float:
    """Resident memory in MiB of the largest process of a process group."""
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
    """kill -9 for the process and all its descendants, including workers and torchrun's ranks in their own sessions."""
    for pid in [process.pid, *(pid for pid in training_processes() if distance(pid, process.pid) > 0)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def kill_worker(process: subprocess.Popen, generation: int, chooser: random.Random) -> bool:
    """Kill one DataLoader worker and wait until the run has ended by itself; False if no worker is running."""
    workers = [pid for pid in training_processes() if distance(pid, process.pid) == generation]
    if workers:
        os.kill(chooser.choice(workers), chooser.choice((signal.SIGKILL, signal.SIGSEGV)))
        process.wait(120)
    return bool(workers)


def training_processes() -> list[int]:
    """Process IDs of everything that runs train.py, its forked workers included."""
    return [
        int(pid) for pid in subprocess.run(["pgrep", "-f", "train.py"], capture_output=True, text=True).stdout.split()
    ]


def distance(pid: int, ancestor: int) -> int:
    """Number of generations between a process and its ancestor; -1 if they are not related."""
    for generations in range(100):
        if pid == ancestor:
            return generations
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
    return -1


def wait_for_the_moment(
    process: subprocess.Popen, output: Path, seconds: float, *, starting: bool, at_saving: bool
) -> tuple[bool, float]:
    """(True when it is time to kill, or False if the run has ended by itself; maximum resident memory in MiB)."""
    launched, memory = time.time(), 0.0
    begin = launched if starting else None
    while process.poll() is None:
        memory = max(memory, resident_mib(process.pid))
        if begin is None and any(modified(path) > launched for path in output.glob("*.pth")):
            begin = time.time()
        late = begin is not None and time.time() - begin >= seconds
        if late and (not at_saving or any(output.glob(".*.tmp"))):
            return True, memory
        time.sleep(0.002 if late else 0.05)
    return False, memory


def modified(path: Path) -> float:
    """Modification time of a file; 0 if it has just been replaced."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def differences(first: Any, second: Any, name: str = "") -> list[str]:
    """Names of the entries that differ between two checkpoints."""
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


def mask_ap(output: Path) -> str:
    """The last mask AP in the output of a run."""
    return (re.findall(r"mask AP [\d.]+, AP50 [\d.]+", output.with_suffix(".log").read_text()) or ["none"])[-1]


def problems(output: Path, text: str) -> list[str]:
    """What is wrong with a run whose worker was killed: no sentence, a traceback, or steps that were not saved."""
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    trained = max((row["step"] for row in rows if row["kind"] == "train"), default=0)
    state = load_file(output / "last.pth")
    saved = state["epoch"] * next(row["steps_per_epoch"] for row in rows if row["kind"] == "start") + state["step"]
    found = {
        "no error message": "error: " not in text,
        "traceback": str(ROOT / "solov2") in text,
        f"saved step {saved}, trained {trained}": saved < trained,
    }
    return [problem for problem, true in found.items() if true]


def main() -> int:
    """Print the kills, the memory and the differences; returns exit code 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--workers", action="store_true", help="kill one DataLoader worker each time")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, nargs=2, default=(0, 1), metavar=("LOW", "HIGH"))
    parser.add_argument("--seed", type=int, default=0)
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, words = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    args.folder.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # four busy-waiting processes on two cores would slow each other down
    words, moments = words or tiny_words(args.folder), random.Random(args.seed)
    words += ["--set", "train.checkpoint_steps=0"] if args.workers else []
    whole, killed = args.folder / "whole", args.folder / "killed"
    begin = time.monotonic()
    undisturbed = start(words, whole, args.processes, resume=False)
    kills, memories, lost, alive = [], [], [], True
    while alive:
        process = start(words, killed, args.processes, resume=any(killed.glob("*.pth")))
        at_saving, starting = len(kills) % 3 == 0 and not args.workers, len(kills) % 5 == 4 and not args.workers
        read = killed.with_suffix(".log").stat().st_size
        seconds = moments.uniform(1, 6) if starting else moments.uniform(*args.seconds)
        alive, memory = wait_for_the_moment(
            process,
            killed,
            seconds if len(kills) < args.kills else 1e9,
            starting=starting,
            at_saving=at_saving and not starting,
        )
        memories.append(round(memory))
        if alive and args.workers:
            if kill_worker(process, 1 if args.processes == 1 else 2, moments) and process.returncode:
                kills.append("worker")
                lost += problems(killed, killed.with_suffix(".log").read_text()[read:])
            else:
                process.wait()
                alive = process.returncode != 0
        elif alive:
            kill_group(process)
            kills.append("starting" if starting else "saving" if at_saving else "training")
            if not any(killed.glob("*.pth")) and killed.exists():  # killed before the first checkpoint: start over
                shutil.rmtree(killed)
        elif process.returncode:
            raise SystemExit(f"a resumed run failed, see {killed.with_suffix('.log')}")
    killed_seconds = time.monotonic() - begin
    if undisturbed.wait():
        raise SystemExit(f"the undisturbed run failed, see {whole.with_suffix('.log')}")
    different = [
        difference
        for name in ("last.pth", "best.pth")
        for difference in differences(load_file(whole / name), load_file(killed / name), name)
    ]
    report = {
        "kills": {kind: kills.count(kind) for kind in ("training", "saving", "starting", "worker")},
        "processes": args.processes,
        "seconds": round(killed_seconds, 1),
        "resident_mib_per_start": memories,
        "results": {path.name: mask_ap(path) for path in (whole, killed)},
        "different": different,
        "lost": lost,
    }
    print(json.dumps(report))
    return bool(different or lost)


if __name__ == "__main__":
    sys.exit(main())
