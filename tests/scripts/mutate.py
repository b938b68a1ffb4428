"""Feed mutated annotation files, configurations, checkpoints and images to the commands, and count how they end.

    python tests/scripts/mutate.py FOLDER [--kinds annotations ...] [--count 1000] [--processes 200] [--seed 0]

Every mutant must end in success or in one sentence (`error: ...`, exit code 1 or 2): never in a traceback, a crash or a
hang. The mutants run through the commands' `main(argv)` in child processes, a chunk of 25 in each; the first
`--processes` of every kind also as processes of their own. Prints one JSON object per kind: the outcomes, the peak of
resident memory above the start, and the first ten failures with the file that reproduces each. The exit code is 1 if
anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import math
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.tiny_runs import arguments, tiny_config  # noqa: E402

from solov2.build import construct  # noqa: E402
from solov2.commands.main import command_module  # noqa: E402
from solov2.config import load_config  # noqa: E402
from solov2.convert import to_mmdet  # noqa: E402
from solov2.data.shapes import generate_shapes  # noqa: E402

CHUNK, TIMEOUT = 25, 60.0  # mutants of one child process; seconds of one mutant
ODD_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 1.0, 0.5, -0.0, 3.7, 2**31, 2**63, 10**30, 1e308, -1e308,
    math.nan, math.inf, -math.inf, "", " ", "1", "1.0", "x", "../../x", "/etc/passwd", "a\\b.png", "\x1b[31mred",
    "\u202egnp", "ä漢字", "\ud83d", "x" * 5000, [], [[]], [0], [None], [[0, 0, 1, 1]], [1e30] * 6, {},
    {"size": [4, 4], "counts": "11"}, {"a": {"b": []}}, "2024-01-01",
]  # fmt: skip


def paths_of(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every node below a JSON-like value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return [found for key, child in items for found in ((*path, key), *paths_of(child, (*path, key)))]


def mutate_tree(tree: Any, rng: random.Random, odd: list[Any]) -> None:
    """Change one to three nodes of nested dictionaries and lists in place."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        paths = paths_of(tree)
        if not paths:
            return
        *parents, key = rng.choice(paths)
        node = tree
        for step in parents:
            node = node[step]
        if isinstance(node, tuple):
            continue
        kind = rng.random()
        if kind < 0.15:
            del node[key]
        elif kind < 0.3 and isinstance(node, list):
            node.insert(key, copy.deepcopy(node[key]))
        elif kind < 0.4 and isinstance(node[key], (int, float)) and not isinstance(node[key], bool):
            node[key] = rng.choice((str(node[key]), -node[key], node[key] * 1000, node[key] + 0.5, float(node[key])))
        elif kind < 0.5:
            node[key] = copy.deepcopy(rng.choice(list(node.values()) if isinstance(node, dict) else node))
        else:
            node[key] = copy.deepcopy(rng.choice(odd))


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip bits, cut, repeat, or overwrite a part of a file."""
    data = bytearray(content)
    at = rng.randrange(len(data))
    match rng.randrange(5):
        case 0:
            data[at] ^= 1 << rng.randrange(8)
        case 1:
            for _ in range(rng.randrange(2, 20)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        case 2:
            del data[at:]
        case 3:
            data[at:at] = data[at : at + rng.randrange(1, 64)]
        case 4:
            del data[at : at + rng.randrange(1, 64)]
    return bytes(data)


class Lab:
    """The originals of all kinds in a folder, and the mutants made of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "shapes"
        generate_shapes(self.data, train_images=6, val_images=2, size=64, seed=0)
        self.annotations = json.loads((self.data / "annotations/instances_train2017.json").read_text())
        self.config = tiny_config("train.epochs=1", f"data.root={self.data}", "data.shapes=false", "data.workers=0")
        (folder / "tiny.yaml").write_text(yaml.safe_dump(self.config.to_dict()))
        self.run = folder / "run"
        if not (self.run / "last.pth").is_file():
            words = arguments(self.data, self.run, "--epochs", "1", "--set", "data.shapes_train=6", "--set",
                              "data.shapes_val=2", "--set", "data.workers=0", "--overwrite")  # fmt: skip
            done = subprocess.run([sys.executable, str(ROOT / "train.py"), *words], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"the run to mutate failed: {done.stderr}")
        self.checkpoint = (self.run / "last.pth").read_bytes()
        self.content = torch.load(io.BytesIO(self.checkpoint), weights_only=True)
        group = [f"model.{name}_channels=32" for name in ("tower", "mask_hidden", "mask_feature")]
        config = load_config("solov2_light_r18_fpn_3x", ["model.backbone_width=16", "model.fpn_channels=32", *group])
        self.foreign = {"state_dict": to_mmdet(construct(config.model, ["x"] * 80).state_dict())}
        images = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        self.images: dict[str, bytes] = {}
        for suffix, mode in (("jpg", "RGB"), ("png", "P"), ("tif", "RGB"), ("webp", "RGB"), ("gif", "P"), ("bmp", "L")):
            buffer = io.BytesIO()
            Image.fromarray(images).convert(mode).save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix))
            self.images[suffix] = buffer.getvalue()

    def make(self, kind: str, number: int, seed: int) -> list[str]:
        """Write mutant `number` of a kind; returns the command line to run on it."""
        rng = random.Random(f"{kind} {number} {seed}")
        return getattr(self, f"_make_{kind}")(self.folder / "mutants" / f"{kind}_{number}", rng)

    def _make_annotations(self, path: Path, rng: random.Random) -> list[str]:
        file = path.with_suffix(".json")
        if rng.random() < 0.2:
            file.write_bytes(mutate_bytes(json.dumps(self.annotations).encode(), rng))
        else:
            tree = copy.deepcopy(self.annotations)
            mutate_tree(tree, rng, ODD_VALUES)
            file.write_text(json.dumps(tree))
        images = str(self.data / "train2017")
        fix = ["--fix", str(path.with_suffix(".fixed.json")), "--overwrite"]
        tiny = str(self.folder / "tiny.yaml")
        train = ["train", tiny, "--train-annotations", str(file), "--train-images", images, "--dry-run"]
        test = ["eval", tiny, "--oracle", "--val-annotations", str(file), "--val-images", images, "--device", "cpu"]
        return rng.choice((["check-data", str(file), "--images", images, *fix], train, test))

    def _make_configuration(self, path: Path, rng: random.Random) -> list[str]:
        file = path.with_suffix(".yaml")
        tree: Any = self.config.to_dict()
        if rng.random() < 0.3:
            file.write_bytes(mutate_bytes(yaml.safe_dump(tree).encode(), rng))
        else:
            odd = [value for value in ODD_VALUES if value != "\ud83d"]
            mutate_tree(tree, rng, [*odd, "cpu", [1, 2], [[1, 2]] * 5, 10**6])
            file.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
        return ["train", str(file), "--dry-run", "--device", "cpu"]

    def _make_checkpoint(self, path: Path, rng: random.Random) -> list[str]:
        file = path.with_suffix(".pth")
        if rng.random() < 0.5:
            file.write_bytes(mutate_bytes(self.checkpoint, rng))
        else:
            content = copy.deepcopy(self.foreign if rng.random() < 0.2 else self.content)
            mutate_tree(content, rng, [*ODD_VALUES[:-12], torch.zeros(3), torch.tensor(math.nan), [], {}, {"a": 1}])
            torch.save(content, file)
        picture = str(next((self.data / "val2017").iterdir()))
        run = path.with_suffix(".run")
        return rng.choice(
            (
                ["convert", str(file), str(path.with_suffix(".out.pth")), "--overwrite"],
                ["predict", picture, "--weights", str(file), "--output", str(run), "--device", "cpu", "--overwrite"],
                ["train", "--resume", str(file), "--output", str(run), "--device", "cpu", "--overwrite"],
            )
        )

    def _make_image(self, path: Path, rng: random.Random) -> list[str]:
        suffix = rng.choice(list(self.images))
        file = path.with_suffix(f".{suffix}")
        file.write_bytes(mutate_bytes(self.images[suffix], rng))
        weights, output = str(self.run / "last.pth"), str(path.with_suffix(".drawn"))
        return ["predict", str(file), "--weights", weights, "--output", output, "--device", "cpu", "--overwrite"]


KINDS = ("annotations", "configuration", "checkpoint", "image")


def in_process(words: list[str]) -> tuple[str, str]:
    """(outcome, details) of a command line run by `main(argv)` in this process."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = command_module(words[0]).main(words[1:])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 2
    except BaseException:
        return "traceback", traceback.format_exc()[-1500:]
    return judged(words[0], code, err.getvalue())


def as_process(words: list[str]) -> tuple[str, str]:
    """(outcome, details) of a command line run as a process of its own."""
    command = [sys.executable, "-m", "solov2", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, errors="replace", cwd=ROOT)
    except subprocess.TimeoutExpired:
        return "hang", " ".join(words)
    return judged(words[0], done.returncode, done.stderr)


def judged(command: str, code: int, errors: str) -> tuple[str, str]:
    """Success, a sentence, or what is wrong with this end."""
    if "Traceback (most recent call last)" in errors:
        return "traceback", errors[-1500:]
    if code == 0 or (command == "check-data" and code == 1):
        return "success", ""
    last = [line for line in errors.splitlines() if line.startswith("error: ")]
    return ("sentence", last[-1]) if code in (1, 2) and len(last) == 1 else ("no sentence", f"{code} {errors[-1500:]}")


def child(lab: Lab, kind: str, numbers: range, seed: int, answers: Connection) -> None:
    """Run a chunk of mutants; send a message before and after each."""
    os.chdir(lab.folder)
    torch.set_num_threads(1)
    before = peak_mib()
    for number in numbers:
        words = lab.make(kind, number, seed)
        answers.send({"number": number, "words": words})
        outcome, details = in_process(words)
        answers.send({"outcome": outcome, "details": details, "mib": peak_mib() - before})


def peak_mib() -> float:
    """The peak of this process's resident memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_chunk(lab: Lab, kind: str, numbers: range, seed: int) -> Iterator[dict[str, Any]]:
    """Run mutants in a child process; one that hangs or dies is replaced for the rest of the chunk."""
    fork = multiprocessing.get_context("fork")
    start = numbers.start
    while start < numbers.stop:
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(target=child, args=(lab, kind, range(start, numbers.stop), seed, sender))
        process.start()
        sender.close()
        mutant: dict[str, Any] = {}
        while start < numbers.stop:
            hangs = not receiver.poll(TIMEOUT)
            try:
                answer = {"outcome": "hang"} if hangs else receiver.recv()
            except EOFError:
                answer = {"outcome": "crash"}
            mutant = {"number": start, "words": [], "details": "", "mib": 0.0} | mutant | answer
            if "outcome" in answer:
                yield mutant
                start, mutant = start + 1, {}
            if answer.get("outcome") in ("hang", "crash"):
                break
        process.kill()
        process.join()


class Tally:
    """How the mutants of a kind ended."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = {"in process": Counter(), "as process": Counter()}
        self.failures: list[dict[str, Any]] = []
        self.largest: dict[str, Any] = {"mib": 0.0}

    def add(self, mutant: dict[str, Any], way: str) -> None:
        """Count one mutant."""
        self.outcomes[way][mutant["outcome"]] += 1
        if mutant["outcome"] not in ("success", "sentence"):
            self.failures.append({"way": way, **mutant})
        self.largest = max(self.largest, mutant, key=lambda each: each["mib"])


def main() -> int:
    """Returns exit code 1 if a mutant ended in a traceback, a crash or a hang."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder for originals and mutants")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--count", type=int, default=1000, help="mutants of each kind")
    parser.add_argument("--processes", type=int, default=200, help="how many of them also run as processes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    (args.folder / "mutants").mkdir(parents=True, exist_ok=True)
    lab, failed = Lab(args.folder.resolve()), False
    for kind in args.kinds:
        tally = Tally()
        for first in range(0, args.count, CHUNK):
            for mutant in run_chunk(lab, kind, range(first, min(args.count, first + CHUNK)), args.seed):
                tally.add(mutant, "in process")
        for number in range(min(args.processes, args.count)):
            words = lab.make(kind, number, args.seed)
            outcome, details = as_process(words)
            mutant = {"number": number, "words": words, "outcome": outcome, "details": details, "mib": 0.0}
            tally.add(mutant, "as process")
        failed |= bool(tally.failures)
        row = {"kind": kind, "outcomes": tally.outcomes, "largest": tally.largest, "failures": tally.failures[:10]}
        print(json.dumps(row), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
