"""Check an accelerator: the same results as on the CPU, no waiting inside a training step, speed and memory.

    python tests/scripts/gpu_check.py [--only ITEM ...] [--out DIR] [--device NAME]

Every item runs in its own process, so that a failure or a broken device context does not affect the others, and writes
DIR/ITEM.json when it is done; a table of all results is printed at the end. On a CPU the same items run at small sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.parity import (  # noqa: E402
    BATCHES,
    FORWARD,
    NMS_SETS,
    POSTPROCESS_CASES,
    criterion_of,
    network_input,
    postprocess_case,
    raw_tensors,
    reference_model,
    stored_batch,
    stored_set,
)
from helpers.tiny_models import lively  # noqa: E402
from helpers.tiny_runs import SETTINGS, random_batch, tiny_config  # noqa: E402

import solov2  # noqa: E402
from solov2.build import build_criterion, construct  # noqa: E402
from solov2.compute import Compute, select_device, synchronize  # noqa: E402
from solov2.config import Config, load_config  # noqa: E402
from solov2.data.categories import default_class_names  # noqa: E402
from solov2.ops.matrix_nms import matrix_nms  # noqa: E402
from solov2.predict import Predictor  # noqa: E402
from solov2.training.environment import environment  # noqa: E402
from solov2.training.guard import NonFiniteGuard  # noqa: E402
from solov2.training.optim import WeightAverage, build_optimizer  # noqa: E402
from solov2.training.step import take_step  # noqa: E402

CPU = torch.device("cpu")
LIMIT = 150  # seconds per item
FORMS = {"float32": ("float32", False), "tf32": ("float32", True), "bf16": ("bf16", True)}  # precision, TF32


def allow_tf32(convolutions: bool) -> None:
    """Switch TF32 convolutions on or off for the rest of the process; matrix products stay float32, torch's default."""
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, False


def check_environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions and flags of the backends."""
    return {
        **environment(device),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "tf32_products": torch.backends.cuda.matmul.allow_tf32,
    }


# ---- the same results as on the CPU


def check_parity(device: torch.device) -> dict[str, Any]:
    """Maximum differences from the CPU in float32, without TF32, for the stored reference cases in tests/data."""
    allow_tf32(False)
    return {
        **_network_parity(device),
        "losses and their gradients": max(_loss_difference(case, device) for case in BATCHES.values()),
        **_postprocess_parity(device),
        "Matrix NMS": max(_nms_difference(name, device) for name in NMS_SETS),
    }


def difference(found: Tensor, wanted: Tensor) -> float:
    """Maximum absolute difference; more than 1e308 if a value is not finite."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return (found - wanted).abs().nan_to_num(nan=torch.inf).max().item()


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    """Maximum difference divided by the standard deviation of `wanted`, or by its absolute value if it is a scalar."""
    values = wanted.detach().double()
    scale = values.std(correction=0) if values.numel() > 1 else values.abs()
    return difference(found, wanted) / max(scale.item(), 1e-30)


def _network_parity(device: torch.device) -> dict[str, float]:
    stored = FORWARD["solov2_light_r18"]
    images, outputs, norms = network_input(**stored["input"])[:1], [], []
    for place in (device, CPU):
        model = reference_model("solov2_light_r18", stored["overrides"]).to(place).train()
        outputs.append(raw_tensors(model(images.to(place))))
        sum(tensor.square().mean() for tensor in outputs[-1]).backward()
        norms.append(torch.stack([p.grad.double().norm() for p in model.parameters() if p.grad is not None]).cpu())
    return {
        "raw outputs of light R18": max(map(relative_difference, *outputs)),
        "its weight gradients, in norm": difference(norms[0] / norms[1], torch.ones(len(norms[1]))),
    }


def _loss_difference(case: dict[str, Any], device: torch.device) -> float:
    found = []
    for place in (device, CPU):
        raw, targets = stored_batch(case, torch.float32, place)
        losses = criterion_of(case)(raw, targets)
        sum(losses.values()).backward()
        found.append([*losses.values(), *(leaf.grad for leaf in raw_tensors(raw))])
    return max(map(relative_difference, *found))


def _postprocess_parity(device: torch.device) -> dict[str, Any]:
    """Compares instances rank by rank in images where both devices find the same number."""
    scores, pixels, other_counts = 0.0, 0, 0
    for case in POSTPROCESS_CASES.values():
        for found, wanted in zip(*(postprocess_case(case, torch.float32, place) for place in (device, CPU))):
            if len(found["scores"]) != len(wanted["scores"]):
                other_counts += 1
            elif len(wanted["scores"]):
                scores = max(scores, difference(found["scores"], wanted["scores"]))
                pixels += int((found["masks"].cpu() != wanted["masks"]).sum())
    return {
        "scores of post-processing": scores,
        "mask pixels of post-processing": pixels,
        "images with another number of instances": other_counts,
    }


def _nms_difference(name: str, device: torch.device) -> float:
    here = stored_set(name, torch.float32)
    there = [tensor.to(device) for tensor in here]
    kernels = "gaussian", "linear"
    return max(difference(matrix_nms(*there, kernel=kernel), matrix_nms(*here, kernel=kernel)) for kernel in kernels)


# ---- the training step


class Training:
    """A model with everything a training step needs, as in `solov2.train`, and a synthetic batch."""

    def __init__(self, config: Config, compute: Compute, images: int, size: tuple[int, int]) -> None:
        torch.manual_seed(0)
        self.compute, self.scaler = compute, compute.scaler()
        self.model = compute.place(construct(config.model, default_class_names(config.model.num_classes))).train()
        self.criterion = build_criterion(config.model)
        self.optimizer = build_optimizer(
            self.model, name="sgd", learning_rate=1e-6, momentum=0.9, weight_decay=1e-4, decay_norms=True
        )
        self.batch = random_batch(config, seed=0, images=images, instances=8, size=size)
        if compute.device.type != "cpu":  # as the loader does, so that copies do not wait
            self.batch = tree_map_only(Tensor, Tensor.pin_memory, self.batch)

    def step(self) -> tuple[dict[str, Tensor], Tensor]:
        """One optimizer step; returns its losses and its status, on the device."""
        return take_step(
            self.model, self.criterion, [self.batch], self.optimizer, self.scaler, self.compute, clip_norm=35.0
        )


def check_step(device: torch.device) -> dict[str, Any]:
    """Losses of real training steps with weight average and guard; raises if the host waits for the device."""
    found: dict[str, Any] = {}
    for precision in ("float32", "bf16"):
        training = Training(load_config("quickstart"), Compute(device, precision, torch.channels_last), 2, (192, 192))
        average, guard = WeightAverage(training.model, 0.9), NonFiniteGuard(Path(tempfile.gettempdir()))
        for step in range(4):
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")  # the first steps may wait
            losses, status = training.step()
            guard.watch(step, status, [training.batch])
            average.update(training.model)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        assert guard.failure(now=True) is None, f"a step in {precision} was not finite"
        found[precision] = {name: loss.item() for name, loss in losses.items()}
    return {**found, "waits": 0 if device.type == "cuda" else "not watched on this device"}


# ---- speed and memory


def check_training(device: torch.device) -> dict[str, Any]:
    """Images per second of queued training steps, and their peak memory."""
    config, size, counts = _workload(device, (800, 1344), (2, 16))
    rows: dict[str, Any] = {"model": config.name, "size": size}
    for form, (precision, allowed) in FORMS.items():
        allow_tf32(allowed)
        for count in counts:
            training = Training(config, Compute(device, precision, torch.channels_last), count, size)
            rows[f"{form}, batch {count}"] = _speed(training.step, count, device)
    return rows


def check_inference(device: torch.device) -> dict[str, Any]:
    """Images per second from padded pixels to 480 x 640 masks; the random weights find max_instances instances."""
    config, size, counts = _workload(device, (800, 1088), (1, 8))
    rows: dict[str, Any] = {"model": config.name, "size": size}
    torch.manual_seed(0)
    plain = lively(solov2.build_model(config, device=device)).to(memory_format=torch.channels_last)
    for form, (precision, allowed) in FORMS.items():
        allow_tf32(allowed)
        fast = plain.optimize(precision=precision)  # its weights are cast to bf16, so it needs no autocast
        for kind, model, cast in (("plain", plain, precision), ("optimized", fast, "float32")):
            predictor = Predictor(model, Compute(device, cast, torch.channels_last), mask_format="bool")
            for count in counts:
                pixels = torch.randint(256, (count, 3, *size), dtype=torch.uint8)
                sizes, original_sizes = (torch.tensor([pair] * count) for pair in (size, (480, 640)))
                batch = {"pixels": pixels, "sizes": sizes, "original_sizes": original_sizes}
                found = len(_predict(predictor, batch)[0]["scores"])
                speed = _speed(partial(_predict, predictor, batch), count, device)
                rows[f"{form}, {kind}, batch {count}"] = {**speed, "instances": found}
    return rows


def _predict(predictor: Predictor, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
    predictor.launch(batch)
    return predictor.collect()


def _workload(
    device: torch.device, size: tuple[int, int], counts: tuple[int, int]
) -> tuple[Config, tuple[int, int], tuple[int, int]]:
    """Configuration, input size and images per batch: as given for an accelerator, tiny ones for a CPU."""
    if device.type == "cpu":
        return tiny_config(), (64, 96), (1, 2)
    return load_config("solov2_r50_fpn_1x"), size, counts


def _speed(step: Callable[[], Any], images: int, device: torch.device) -> dict[str, Any]:
    """Warm up, queue steps and wait once; a step that does not fit into memory is reported without a speed."""
    on_cpu = device.type == "cpu"
    warmup, count = (1, 2) if on_cpu else (5, 20)
    try:
        for _ in range(warmup):
            step()
        if not on_cpu:
            torch.accelerator.reset_peak_memory_stats(device)
        synchronize(device)
        started = time.perf_counter()
        for _ in range(count):
            step()
        synchronize(device)
    except torch.OutOfMemoryError:
        return {"images_per_second": None, "ms": None, "peak_mib": "more than there is"}
    seconds = time.perf_counter() - started
    peak = None if on_cpu else torch.accelerator.max_memory_allocated(device) / 2**20
    return {"images_per_second": images * count / seconds, "ms": 1000 * seconds / count, "peak_mib": peak}


def check_quickstart(device: torch.device) -> dict[str, Any]:
    """The quickstart end to end; on a CPU, two epochs at a small size."""
    tiny = [*SETTINGS, "train.epochs=2"]
    config = load_config(
        "quickstart", tiny if device.type == "cpu" else [f"data.workers={min(8, os.cpu_count() or 1)}"]
    )
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        result = solov2.train(config, data=f"{folder}/shapes", output=f"{folder}/run", device=str(device))
        seconds = time.perf_counter() - started
    return {"seconds": seconds, **{name: result.metrics[name] for name in ("segm_AP", "segm_AP50", "bbox_AP")}}


# ---- one process per item

ITEMS: dict[str, Callable[[torch.device], dict[str, Any]]] = {
    "environment": check_environment,
    "parity": check_parity,
    "step": check_step,
    "training": check_training,
    "inference": check_inference,
    "quickstart": check_quickstart,
}


def main(argv: list[str] | None = None) -> int:
    """Run the items; returns 0 if all of them succeeded, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ITEMS, default=list(ITEMS), metavar="ITEM", help=", ".join(ITEMS))
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), metavar="DIR", help="default: gpu_check/")
    parser.add_argument("--device", help="default: the accelerator, if there is one")
    parser.add_argument("--here", choices=ITEMS, help=argparse.SUPPRESS)  # set by main for the process of an item
    args = parser.parse_args(argv)
    if args.here:
        return _run_here(args.here, args.out, args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    for item in args.only:
        (args.out / f"{item}.json").unlink(missing_ok=True)  # of an earlier call
        command = [sys.executable, __file__, "--here", item, "--out", str(args.out)]
        command += ["--device", args.device] if args.device else []
        try:
            subprocess.run(command, timeout=LIMIT, check=False)
        except subprocess.TimeoutExpired:
            _write(args.out, item, {"error": f"took longer than {LIMIT} seconds"})
    return _show_table(args.out, args.only)


def _run_here(item: str, folder: Path, device: str | None) -> int:
    started = time.perf_counter()
    try:
        found = ITEMS[item](select_device(device))
    except Exception as error:  # any error is the result of its item
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"}
    _write(folder, item, {**found, "item_seconds": round(time.perf_counter() - started, 1)})
    return 1 if "error" in found else 0


def _write(folder: Path, item: str, found: dict[str, Any]) -> None:
    (folder / f"{item}.json").write_text(json.dumps(found, indent=1) + "\n")


def _show_table(folder: Path, items: list[str]) -> int:
    failed = False
    for item in items:
        path = folder / f"{item}.json"
        found = json.loads(path.read_text()) if path.is_file() else {"error": "the process ended without a result"}
        failed |= "error" in found
        print(f"{item}:")
        for name, value in found.items():
            parts = value if isinstance(value, dict) else {"": value}
            words = [f"{key} {_short(part)}".strip() for key, part in parts.items() if part is not None]
            print(f"  {name:<44}{'  '.join(words)}")
    return int(failed)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
