"""Times this library beside mmdetection: same weights, same image, same outputs, alternating in one run.

    python tests/peer/compare.py PEER_DIR PEER_PYTHON [--only infer train post nms panoptic data trained] [--json FILE]

PEER_DIR holds peer.py, PEER_PYTHON is the interpreter of its environment. Every ratio is peer time / our time, of the
medians of `--rounds` alternating runs after one that does not count. Memory is what a training step adds to a process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from peer_worker import forget_peak, resident  # noqa: E402

from solov2.benchmarking.synthetic import ellipses, synthetic_raw  # noqa: E402
from solov2.build import (  # noqa: E402
    build_assigner,
    build_compute,
    build_criterion,
    build_model,
    prepare_for_training,
)
from solov2.checkpoint import load_file  # noqa: E402
from solov2.compute import reuse_freed_memory  # noqa: E402
from solov2.config import Config, load_config  # noqa: E402
from solov2.data.build import prepare_data, validation_dataset, validation_loader  # noqa: E402
from solov2.data.coco import CocoInstances  # noqa: E402
from solov2.data.loader import Collate  # noqa: E402
from solov2.data.transforms import TrainTransform, TransformedDataset  # noqa: E402
from solov2.models.solov2 import SOLOv2  # noqa: E402
from solov2.ops.label_map import label_map  # noqa: E402
from solov2.ops.masks import encode_rle  # noqa: E402
from solov2.ops.matrix_nms import matrix_nms  # noqa: E402
from solov2.ops.merge import merge_segments  # noqa: E402
from solov2.ops.resample import Axis, MaskResampler  # noqa: E402
from solov2.targets import TargetAssigner  # noqa: E402
from solov2.training.optim import build_optimizer  # noqa: E402

CASES = {"solov2_r50": (800, 1216), "solov2_light_r50": (448, 768)}  # network -> input
PHOTOGRAPHS = ((480, 640), (3000, 4000))  # (height, width) that masks are brought to


class Peer:
    """The reference in its own process; an attribute call is a step of peer_worker.py."""

    def __init__(self, folder: str, python: str, threads: int) -> None:
        command = [python, str(Path(__file__).with_name("peer_worker.py")), folder, str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def __getattr__(self, step: str) -> Callable[..., dict[str, Any]]:
        def call(**arguments: Any) -> dict[str, Any]:
            self.process.stdin.write(json.dumps({"do": step, **arguments}) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
            if not answer:
                raise RuntimeError(f"the reference's process ended in step {step}")
            return json.loads(answer)

        return call

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def alternate(rounds: int, **steps: Callable[[], Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """(median seconds, last result) of each step, taken in turns; a step may return its own "seconds"."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    results: dict[str, Any] = {}
    for round_number in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            results[name] = step()
            taken = time.perf_counter() - start
            if isinstance(results[name], dict):
                taken = results[name].get("seconds", taken)
            if round_number:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}, results


def load_ours(config: str, folder: str) -> tuple[SOLOv2, Tensor, Tensor]:
    """(our model with the reference's weights, normalized image [1, 3, H, W], its size [1, 2])."""
    model = build_model(f"{config}_fpn_3x", weights=Path(folder) / "weights.pth")
    pixels = torch.load(Path(folder) / "image.pth", weights_only=True)["image"].flip(0)[None]
    sizes = torch.tensor([pixels.shape[2:]])
    return model, model.normalize(pixels, sizes), sizes


def compare_inference(peer: Peer, config: str, folder: str, rounds: int) -> dict[str, Any]:
    """Normalized image to boolean masks: plain, optimized, and optimized in bf16."""
    model, images, sizes = load_ours(config, folder)
    fast, half = model.optimize(), model.optimize(precision="bf16")
    layout = images.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def run(network: SOLOv2, inputs: Tensor) -> dict[str, Any]:
        start = time.perf_counter()
        raw = network(inputs)
        middle = time.perf_counter()
        (result,) = network.postprocess(raw, sizes, sizes)
        end = time.perf_counter()
        return {"seconds": end - start, "parts": [middle - start, end - middle], "found": len(result["scores"]),
                "score_sum": float(result["scores"].sum())}  # fmt: skip

    seconds, results = alternate(
        rounds,
        peer=peer.infer,
        plain=lambda: run(model, images),
        optimized=lambda: run(fast, layout),
        bf16=lambda: run(half, layout),
    )
    return report(seconds, results)


def compare_training(peer: Peer, config: str, folder: str, rounds: int, instances: int) -> dict[str, Any]:
    """A training step, target assignment included, on one image; rounds = 0 measures memory only.

    Memory is what the first step adds to a process that has built its model, in MiB.
    """
    peer.truth(instances=instances, file=f"{folder}/truth.npz")
    first = {"peer": peer.train()}
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        first["ours"] = fresh.apply(first_training_step, (config, folder, torch.get_num_threads()))
    memory = {side: answer["peak"] - answer["before"] for side, answer in first.items()}
    memory["ours / peer"] = memory["ours"] / memory["peer"]
    if not rounds:
        return {**report({side: answer["seconds"] for side, answer in first.items()}, first), "memory": memory}
    step = training_step(config, folder)
    step()  # the reference has taken one step more, and the losses of the last ones are compared
    seconds, results = alternate(rounds, peer=peer.train, ours=step, bf16=training_step(config, folder, "bf16"))
    return {**report(seconds, results), "memory": memory}


def first_training_step(config: str, folder: str, threads: int) -> dict[str, Any]:
    """One training step of a fresh process."""
    torch.set_num_threads(threads)
    return training_step(config, folder)()


def training_step(config: str, folder: str, precision: str = "float32") -> Callable[[], dict[str, Any]]:
    """A function that trains one step on the image and the ground truth of the folder, with seconds and MiB."""
    model, images, _ = load_ours(config, folder)
    settings = load_config(f"{config}_fpn_3x")
    compute = build_compute(settings, torch.device("cpu"), precision)
    model = prepare_for_training(model, settings, compute)
    images = images.contiguous(memory_format=compute.memory_format)
    assigner, criterion = build_assigner(settings.model), build_criterion(settings.model)
    with np.load(f"{folder}/truth.npz") as file:
        truth = {key: torch.from_numpy(file[key]) for key in ("boxes", "labels", "masks")}
    optimizer = build_optimizer(
        model, name="sgd", learning_rate=1e-5, momentum=0.9, weight_decay=1e-4, decay_norms=True
    )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()

    def run() -> dict[str, Any]:
        forget_peak()
        before = resident("VmRSS")
        start = time.perf_counter()
        targets = assigner([truth], tuple(images.shape[2:]))
        assigned = time.perf_counter()
        with compute.autocast():
            raw = model(images)
        losses = criterion(raw, targets)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 35)
        optimizer.step()
        end = time.perf_counter()
        return {"seconds": end - start, "parts": [assigned - start, end - assigned],
                "before": before, "peak": resident("VmHWM"),
                "losses": {key: loss.item() for key, loss in losses.items()}}  # fmt: skip

    return run


def compare_postprocessing(peer: Peer, config: str, folder: str, rounds: int) -> dict[str, Any]:
    """Raw outputs with 500 candidates and about 100 instances, to photographs of two sizes."""
    model, images, sizes = load_ours(config, folder)
    with torch.no_grad():
        raw = synthetic_raw(model(images), 500, torch.Generator().manual_seed(0))
    torch.save(raw, f"{folder}/raw.pth")
    reports = {}
    for photograph in PHOTOGRAPHS:
        original = torch.tensor([photograph])

        def planes(original: Tensor = original) -> dict[str, Any]:
            start = time.perf_counter()
            (result,) = model.postprocess(raw, sizes, original)
            seconds = time.perf_counter() - start
            return {"seconds": seconds, "found": len(result["scores"]), "pixels": int(result["masks"].sum()),
                    "score_sum": float(result["scores"].sum())}  # fmt: skip

        def run_lengths(original: Tensor = original) -> None:
            model.postprocess(raw, sizes, original, mask_format="rle")

        def theirs(photograph: tuple[int, int] = photograph) -> dict[str, Any]:
            return peer.postprocess(file=f"{folder}/raw.pth", size=sizes[0].tolist(), original_size=photograph)

        seconds, results = alternate(rounds, peer=theirs, ours=planes, run_lengths=run_lengths)
        reports[f"{photograph[0]} x {photograph[1]}"] = report(seconds, results)
    return reports


def compare_nms(peer: Peer, folder: str, rounds: int) -> dict[str, Any]:
    """500 masks of 200 x 304, half of them near duplicates: classes as frequent as in COCO, and one class."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(200), torch.arange(304), indexing="ij")
    base = torch.rand(250, 4, generator=generator)
    base = torch.cat([base, base + 0.03 * torch.randn(250, 4, generator=generator)])
    a, b, c, d = (part[:, None, None] for part in base.unbind(1))
    masks = ((y - a * 200) / (6 + c.abs() * 66)) ** 2 + ((x - b * 304) / (6 + d.abs() * 100)) ** 2 <= 1
    scores = torch.rand(500, generator=generator).sort(descending=True).values
    frequent = torch.multinomial(1 / torch.arange(1, 81.0), 250, replacement=True, generator=generator).repeat(2)
    reports = {}
    for name, labels in (("as frequent as in COCO", frequent), ("one class", torch.zeros(500, dtype=torch.int64))):
        torch.save({"masks": masks, "labels": labels, "scores": scores}, f"{folder}/nms.pth")

        def ours(labels: Tensor = labels) -> Tensor:
            return matrix_nms(masks, labels, scores)

        seconds, results = alternate(rounds, peer=lambda: peer.nms(file=f"{folder}/nms.pth"), ours=ours)
        results["ours"] = {"score_sum": float(results["ours"].sum())}
        reports[name] = report(seconds, results)
    return reports


def compare_panoptic(peer: Peer, folder: str, photograph: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Semantic logits and 100 instances to the panoptic map of a photograph: with planes, with RLEs, and from noise.

    The instances are cut out beforehand, and none is left out for its score. The logits form regions, except for
    "noise": there any label may come anywhere, so that no channel can be left out. To the reference this is the same.
    """
    scale = min(800 / min(photograph), 1333 / max(photograph))
    size = tuple(round(scale * side) for side in photograph)
    grid = tuple(8 * -(-side // 32) for side in size)  # stride 4 of the padded input
    generator = torch.Generator().manual_seed(0)
    logits = F.interpolate(8 * torch.randn(1, 54, 4, 6, generator=generator), grid, mode="bilinear")[0]
    noise = torch.randn(logits.shape, generator=generator)
    soft = (8 * ellipses(100, *grid, generator)).sigmoid()
    resampler = MaskResampler(grid, size, photograph, 0.5, dtype=soft.dtype, device=soft.device)
    masks, boxes = resampler.to_masks(soft)
    instances = {
        "scores": torch.linspace(1, 0.3, 100),
        "labels": torch.arange(100) % 80,
        "boxes": boxes,
        "masks": masks,
    }
    run_lengths = {**instances, "masks": encode_rle(masks)}
    torch.save({"logits": logits[None], **instances}, f"{folder}/panoptic.pth")
    peer.open_panoptic(file=f"{folder}/panoptic.pth", limits={"mask_overlap": 0.5, "stuff_area_limit": 4096})
    limits = {"score_threshold": 0.0, "overlap_threshold": 0.5, "stuff_area_limit": 4096}

    def run(instances: dict[str, Any], logits: Tensor) -> dict[str, Any]:
        forget_peak()
        before = resident("VmRSS")
        start = time.perf_counter()
        semantic = label_map(logits, size, photograph)
        middle = time.perf_counter()
        result = merge_segments(instances, semantic, len(logits) - 1, **limits)
        end = time.perf_counter()
        return {"seconds": end - start, "parts": [middle - start, end - middle], "before": before,
                "peak": resident("VmHWM"), **result}  # fmt: skip

    seconds, results = alternate(
        rounds,
        peer=lambda: peer.panoptic(size=size, original_size=photograph, save=f"{folder}/map.pth"),
        planes=lambda: run(instances, logits),
        run_lengths=lambda: run(run_lengths, logits),
        noise=lambda: run(instances, noise),
    )
    memory = {side: answer["peak"] - answer["before"] for side, answer in results.items()}
    maps = {side: answer.pop("panoptic_map") for side, answer in results.items() if side != "peer"}
    segments = {side: answer.pop("segments") for side, answer in results.items() if side != "peer"}
    classes = torch.full((len(segments["planes"]) + 1,), 133)  # as the reference writes them; 133 for none
    for segment in segments["planes"]:
        label, number = segment["label"], segment["id"]
        classes[number] = label + 1000 * number if segment["is_thing"] else 80 + label
    differs = torch.load(f"{folder}/map.pth", weights_only=True) != classes[maps["planes"]]
    same = {
        "things": sum(segment["is_thing"] for segment in segments["planes"]),
        "stuff": sum(not segment["is_thing"] for segment in segments["planes"]),
        "different_pixels": int(differs.sum()),
        "largest_gap": largest_gap(logits, size, photograph, differs.nonzero()[:1000]),
        "run_lengths_differ": int((maps["planes"] != maps["run_lengths"]).sum()),
    }
    return {**report(seconds, results), "memory": memory, "same": same}


def largest_gap(logits: Tensor, size: tuple[int, int], original: tuple[int, int], pixels: Tensor) -> float:
    """The largest difference between the best two logits at some pixels, int64 [N, 2]; 0 without any."""
    axes = zip(logits.shape[1:], size, original)
    rows, columns = (
        Axis(*sides, torch.float64, logits.device).matrix[place] for sides, place in zip(axes, pixels.unbind(1))
    )
    best = torch.einsum("nh,chw,nw->nc", rows, logits.double(), columns).topk(2).values  # [N, 2]
    return float((best[:, 0] - best[:, 1]).max()) if len(best) else 0.0


def compare_loading(peer: Peer, config: str, root: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds per photograph of the training split on one thread: decoding, polygons, resizing, flip, then targets."""
    settings = load_config(f"{config}_fpn_3x")
    annotations, images = f"{root}/{settings.data.train_annotations}", f"{root}/{settings.data.train_images}"
    long, short = settings.model.input_scale
    dataset = CocoInstances(annotations, images, training=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def start_peer(flip: float) -> None:
        answer = peer.open_data(config=config, annotations=annotations, images=images, scale=[long, short], flip=flip)
        if sorted(answer["image_ids"]) != sorted(dataset.image_ids):
            raise RuntimeError("the two sides do not load the same photographs")

    def load(assigner: TargetAssigner | None, flip: float = settings.data.flip_probability) -> dict[str, Any]:
        transform = TrainTransform(scales=[short], max_size=long, flip_probability=flip)
        samples, collate = TransformedDataset(dataset, transform, seed=0), Collate(assigner)
        seconds, found = 0.0, {"instances": 0, "positives": 0, "pixels": 0}
        for index in range(len(samples)):
            start = time.perf_counter()
            sample = samples[index]
            batch = collate([sample])
            seconds += time.perf_counter() - start
            found["instances"] += len(sample["labels"])
            if assigner is not None:
                instance = batch["targets"]["positives"][:, 2]
                found["positives"] += len(instance)
                found["pixels"] += int(batch["targets"]["masks"].sum((1, 2))[instance].sum())
        return {"seconds": seconds / len(samples), **found}

    assigner = build_assigner(settings.model)
    start_peer(1.0)  # nothing is random: targets have to be the same
    same = {"peer": peer.load(targets=True), "ours": load(assigner, 1.0)}
    same = {side: {key: value for key, value in found.items() if key != "seconds"} for side, found in same.items()}
    start_peer(0.5)
    with_targets = report(*alternate(rounds, peer=lambda: peer.load(targets=True), ours=lambda: load(assigner)))
    alone = report(*alternate(rounds, peer=lambda: peer.load(targets=False), ours=lambda: load(None),
                              ours_with_targets=lambda: load(assigner)))  # fmt: skip
    torch.set_num_threads(threads)
    return {"loading and targets": {**with_targets, "flipped": same}, "loading alone": alone}


def train_quickstart(folder: str) -> Path:
    """Weights after two short epochs on generated shapes: few, but not random."""
    settings = ["train.epochs=2", "data.shapes_train=200", "data.shapes_val=20", f"data.root={folder}/shapes"]
    flags = [part for setting in (*settings, "train.evaluate_every=0") for part in ("--set", setting)]
    command = [sys.executable, ROOT / "train.py", ROOT / "configs/quickstart.yaml", "--output", f"{folder}/run", *flags]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return Path(folder) / "run/last.pth"


@torch.no_grad()
def compare_trained(peer: Peer, weights: Path, folder: str, rounds: int, count: int = 20) -> dict[str, Any]:
    """Post-processing of what a trained model says of `count` validation images, per image.

    `same` counts detections whose label and every mask pixel are those of a detection of the reference.
    """
    config = Config.from_dict(load_file(weights)["config"], source=str(weights))
    prepare_data(config, splits=["val"])
    model, settings = build_model(config, weights=weights), config.model
    peer.open_head(
        head={"num_classes": settings.num_classes, "num_grids": settings.grid_sizes,
              "scale_ranges": settings.scale_ranges, "strides": settings.area_thresholds,
              "in_channels": settings.fpn_channels, "feat_channels": settings.tower_channels},
        mask_branch={"feat_channels": settings.mask_hidden_channels, "out_channels": settings.mask_feature_channels},
        test={"score_thr": settings.category_threshold, "mask_thr": settings.mask_threshold,
              "nms_pre": settings.max_candidates, "kernel": settings.nms_kernel, "sigma": settings.nms_sigma,
              "filter_thr": settings.score_threshold, "max_per_img": settings.max_instances},
    )  # fmt: skip
    outputs = []
    for batch in itertools.islice(validation_loader(config, validation_dataset(config)), count):
        raw = model(model.normalize(batch["pixels"], batch["sizes"]))
        torch.save(raw, f"{folder}/trained{len(outputs)}.pth")
        outputs.append((raw, batch["sizes"], batch["original_sizes"]))

    def ours() -> dict[str, Any]:
        start = time.perf_counter()
        results = [model.postprocess(*output)[0] for output in outputs]
        return {"seconds": (time.perf_counter() - start) / len(outputs), "results": results}

    def theirs() -> dict[str, Any]:
        answers = [
            peer.postprocess(file=f"{folder}/trained{i}.pth", size=size[0].tolist(), original_size=original[0].tolist(),
                             save=f"{folder}/result{i}.pth")
            for i, (_, size, original) in enumerate(outputs)
        ]  # fmt: skip
        return {"seconds": sum(answer["seconds"] for answer in answers) / len(answers)}

    seconds, results = alternate(rounds, peer=theirs, ours=ours)
    found = {"images": len(outputs), "peer": 0, "ours": 0, "same": 0, "score_sum_peer": 0.0, "score_sum_ours": 0.0}
    for i, own in enumerate(results["ours"]["results"]):
        reference = torch.load(f"{folder}/result{i}.pth", weights_only=True)
        keys = [
            Counter((int(label), mask.numpy().tobytes()) for label, mask in zip(side["labels"], side["masks"].bool()))
            for side in (reference, own)
        ]
        found["same"] += (keys[0] & keys[1]).total()
        for name, side in (("peer", reference), ("ours", own)):
            found[name] += len(side["scores"])
            found[f"score_sum_{name}"] += float(side["scores"].sum())
    return report(seconds, found)


def report(seconds: dict[str, float], results: dict[str, Any]) -> dict[str, Any]:
    """Medians, ratios to the reference, and what each side found."""
    ratios = {name: seconds["peer"] / value for name, value in seconds.items() if name != "peer"}
    return {"seconds": seconds, "ratios": ratios, "results": results}


def main() -> int:
    """Print one line per comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer_dir")
    parser.add_argument("peer_python")
    parser.add_argument("--only", nargs="+", choices=("infer", "train", "post", "nms", "panoptic", "data", "trained"),
                        default=["infer", "train", "post", "nms"])  # fmt: skip
    parser.add_argument("--configs", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--instances", type=int, nargs="+", default=[8, 60])
    parser.add_argument("--data-root", metavar="DIR", help="COCO folder whose training photographs `data` loads")
    parser.add_argument(
        "--weights", metavar="FILE", help="checkpoint of train.py for `trained`; without it one is trained"
    )
    parser.add_argument("--photograph", type=int, nargs=2, action="append", metavar=("HEIGHT", "WIDTH"),
                        help="original size for `panoptic`; may be repeated; default: both of `post`")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--reuse-memory", action="store_true",
                        help="let our process keep freed memory, as the commands predict and eval do")  # fmt: skip
    args = parser.parse_args()
    if not Path(args.peer_dir, "peer.py").is_file() or shutil.which(args.peer_python) is None:
        parser.error(f"no peer.py in {args.peer_dir}, or no interpreter {args.peer_python}; see docs/speed.md")
    if "data" in args.only and args.data_root is None:
        parser.error("--only data needs --data-root, a COCO folder")
    torch.set_num_threads(args.threads)
    if args.reuse_memory:
        reuse_freed_memory()
    reports: dict[str, Any] = {}

    def say(name: str, entry: dict[str, Any]) -> None:
        reports[name] = entry
        times = "  ".join(f"{key} {1000 * value:,.0f}" for key, value in entry["seconds"].items())
        ratios = "  ".join(f"{key} {value:.2f}" for key, value in entry["ratios"].items())
        memory = "  ".join(f"{key} {value:,.2f}" for key, value in entry.get("memory", {}).items())
        print(f"{name:<44} ms: {times}   ratio: {ratios}" + (f"   MiB: {memory}" if memory else ""), flush=True)

    if "trained" in args.only:
        with tempfile.TemporaryDirectory() as folder:
            peer = Peer(args.peer_dir, args.peer_python, args.threads)
            weights = Path(args.weights) if args.weights else train_quickstart(folder)
            entry = compare_trained(peer, weights, folder, args.rounds)
            say("post-processing, trained model", entry)
            print(f"    {entry['results']}", flush=True)
            peer.close()
    if "panoptic" in args.only:
        for photograph in map(tuple, args.photograph or PHOTOGRAPHS):
            with tempfile.TemporaryDirectory() as folder:
                peer = Peer(args.peer_dir, args.peer_python, args.threads)
                entry = compare_panoptic(peer, folder, photograph, args.rounds)
                say(f"panoptic map of {photograph[0]} x {photograph[1]}", entry)
                print(f"    {entry['same']}", flush=True)
                peer.close()
    for config in args.configs if not set(args.only) <= {"panoptic", "trained"} else ():
        with tempfile.TemporaryDirectory() as folder:
            peer = Peer(args.peer_dir, args.peer_python, args.threads)
            size = CASES[config]
            if "data" in args.only:
                for name, entry in compare_loading(peer, config, args.data_root, args.rounds).items():
                    say(f"{name}, {config}", entry)
            if set(args.only) <= {"data", "panoptic", "trained"}:
                peer.close()
                continue
            peer.setup(config=config, size=size, candidates=500, folder=folder)
            where = f"{config} {size[0]} x {size[1]}"
            if "infer" in args.only:
                say(f"inference, {where}", compare_inference(peer, config, folder, args.rounds))
            if "post" in args.only and config == "solov2_r50":
                for photograph, entry in compare_postprocessing(peer, config, folder, args.rounds).items():
                    say(f"post-processing to {photograph}", entry)
            if "nms" in args.only and config == args.configs[0]:
                for mix, entry in compare_nms(peer, folder, args.rounds).items():
                    say(f"matrix NMS, 500 masks, {mix}", entry)
            if "train" in args.only:
                for instances in args.instances:
                    say(f"training, {where}, {instances} instances",
                        compare_training(peer, config, folder, args.rounds, instances))  # fmt: skip
            peer.close()
    if args.json:
        Path(args.json).write_text(json.dumps(reports, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
