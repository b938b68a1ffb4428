"""The first proof on an accelerator: the same numbers as on the CPU, no waits inside a step, speed and memory.

    python tests/scripts/gpu_check.py [--only ITEM ...] [--out DIR] [--device NAME]

Every item runs in a process of its own, which neither the failure of another nor a broken device context reaches, and
writes DIR/ITEM.json as soon as it is done; a table of all comes last. On a CPU the same items run at small sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from helpers.parity import (  # noqa: E402  # noqa: E402
    BATCHES,
    NMS_SETS,
    POSTPROCESS_CASES,
    criterion_of,
    load,
    network_input,
    postprocess_case,
    reference_model,
    stored_batch,
    stored_set,
)
from helpers.tiny_runs import SETTINGS, random_batch  # noqa: E402

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


@contextlib.contextmanager
def tf32(wanted: bool) -> Iterator[None]:
    """TF32 convolutions on or off; matrix products are float32 either way, as torch has them."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    flags[0].allow_tf32, flags[1].allow_tf32 = False, wanted
    try:
        yield
    finally:
        flags[0].allow_tf32, flags[1].allow_tf32 = before


def apart(one: Tensor, other: Tensor) -> float:
    """Largest difference relative to the standard deviation (of a scalar: to itself)."""
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    scale = other.std(correction=0) if other.numel() > 1 else other.abs()
    return ((one - other).abs().max() / scale.clamp(min=1e-30)).item()


def check_environment(device: torch.device) -> dict[str, Any]:
    """The machine, the versions and the backends' flags."""
    return {
        **environment(device),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "tf32_products": torch.backends.cuda.matmul.allow_tf32,
    }


def check_parity(device: torch.device) -> dict[str, Any]:
    """Largest differences to the CPU in float32, of the reference's cases in tests/data."""
    with tf32(False):
        return {
            **_network_parity(device),
            "losses and their gradients": max(_loss_difference(name, device) for name in BATCHES),
            **_postprocess_parity(device),
            "Matrix NMS": max(_nms_difference(name, device) for name in NMS_SETS),
        }


def _network_parity(device: torch.device) -> dict[str, float]:
    stored = load("forward.json.gz")["solov2_light_r18"]
    images, raws, gradients = network_input(**stored["input"])[:1], [], []
    for place in (CPU, device):
        model = reference_model("solov2_light_r18", stored["overrides"]).to(place).train()
        raw = model(images.to(place))
        raws.append([*raw["category_logits"], *raw["kernels"], raw["mask_features"]])
        sum(tensor.square().mean() for tensor in raws[-1]).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    return {
        "raw outputs of light R18": max(map(apart, raws[1], raws[0])),
        "its weight gradients, in norm": max(
            abs(one.double().norm().item() / other.double().norm().item() - 1) for one, other in zip(*gradients)
        ),
    }


def _loss_difference(name: str, device: torch.device) -> float:
    found = []
    for place in (CPU, device):
        raw, targets = stored_batch(BATCHES[name], torch.float32, place)
        losses = criterion_of(BATCHES[name])(raw, targets)
        sum(losses.values()).backward()
        leaves = [*raw["category_logits"], *raw["kernels"], raw["mask_features"]]
        found.append([*losses.values(), *(leaf.grad for leaf in leaves)])
    return max(apart(one, other) for one, other in zip(*found) if other.abs().max() > 0)


def _postprocess_parity(device: torch.device) -> dict[str, Any]:
    """Where both find the same number of instances, they are compared rank by rank."""
    scores, pixels, other_counts = 0.0, 0, 0
    for name in POSTPROCESS_CASES:
        for one, other in zip(*(postprocess_case(POSTPROCESS_CASES[name], torch.float32, p) for p in (device, CPU))):
            if len(one["scores"]) != len(other["scores"]):
                other_counts += 1
            elif len(one["scores"]):
                scores = max(scores, (one["scores"].cpu() - other["scores"]).abs().max().item())
                pixels += int((one["masks"].cpu() != other["masks"]).sum())
    return {
        "scores of post-processing": scores,
        "mask pixels of post-processing": pixels,
        "images with another number of instances": other_counts,
    }


def _nms_difference(name: str, device: torch.device) -> float:
    masks, labels, scores = stored_set(name, torch.float32)
    moved = masks.to(device), labels.to(device), scores.to(device)
    return max(
        (matrix_nms(*moved, kernel=kernel).cpu() - matrix_nms(masks, labels, scores, kernel=kernel)).abs().max().item()
        for kernel in ("gaussian", "linear")
    )


class Training:
    """A network with what a step takes, as `solov2.train` puts them together, on a made-up batch."""

    def __init__(self, config: Config, compute: Compute, images: int, size: tuple[int, int]) -> None:
        torch.manual_seed(0)
        self.compute, self.scaler = compute, compute.scaler()
        self.model = compute.place(construct(config.model, default_class_names(config.model.num_classes))).train()
        self.criterion = build_criterion(config.model)
        self.optimizer = build_optimizer(
            self.model, name="sgd", learning_rate=1e-6, momentum=0.9, weight_decay=1e-4, decay_norms=True
        )
        batch = random_batch(config, seed=0, images=images, instances=8, size=size)
        self.batch = _pinned(batch) if compute.device.type != "cpu" else batch

    def step(self) -> tuple[dict[str, Tensor], Tensor]:
        """One optimizer step; returns its losses and what is wrong with it, on the device."""
        return take_step(
            self.model, self.criterion, [self.batch], self.optimizer, self.scaler, self.compute, clip_norm=35.0
        )


def _pinned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.pin_memory()
    return {key: _pinned(item) for key, item in value.items()} if isinstance(value, dict) else value


def check_step(device: torch.device) -> dict[str, Any]:
    """A real step, with averaged weights and the guard, that raises where the host would wait for the device."""
    found: dict[str, Any] = {}
    for precision in ("float32", "bf16"):
        config = load_config("quickstart")
        training = Training(config, Compute(device, precision, torch.channels_last), 2, (192, 192))
        average, guard = WeightAverage(training.model, 0.9), NonFiniteGuard(Path(tempfile.gettempdir()))
        for step in range(4):
            watches = step > 1 and device.type == "cuda"  # first uses may wait
            with _no_waits() if watches else contextlib.nullcontext():
                losses, wrong = training.step()
                guard.watch(step, wrong, [training.batch])
                average.update(training.model)
        found[precision] = {name: loss.item() for name, loss in losses.items()}
        assert guard.failure(now=True) is None, f"a step in {precision} was not finite"
    return {**found, "waits": 0 if device.type == "cuda" else None}


@contextlib.contextmanager
def _no_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_training(device: torch.device) -> dict[str, Any]:
    """Images per second of queued steps and the most memory they held."""
    name, size, counts = ("solov2_r50_fpn_1x", (800, 1344), (2, 16)) if _is_large(device) else SMALL
    config, rows = load_config(name), {}
    for form, (precision, allow) in FORMS.items():
        for count in counts:
            with tf32(allow):
                training = Training(config, Compute(device, precision, torch.channels_last), count, size)
                rows[f"{form}, batch {count}"] = _speed(training.step, count, device)
    return {"model": name, "size": size, **rows}


def check_inference(device: torch.device) -> dict[str, Any]:
    """Images per second from padded pixels to masks at 480 x 640 of a network with random weights."""
    name, size, counts = ("solov2_r50_fpn_1x", (800, 1088), (1, 8)) if _is_large(device) else SMALL
    plain, rows = solov2.build_model(name, device=device), {}
    for form, (precision, allow) in FORMS.items():
        half = precision == "bf16"
        fast = plain.optimize(precision=precision)  # in bf16 its weights are cast, so autocast has nothing to do
        kinds = {"plain": (plain, precision), "optimized": (fast, "float32" if half else precision)}
        for count in counts:
            sizes = torch.tensor([size] * count)
            batch = {"pixels": torch.randint(256, (count, 3, *size), dtype=torch.uint8), "sizes": sizes}
            batch["original_sizes"] = torch.tensor([(480, 640)] * count)
            for kind, (model, cast) in kinds.items():
                predictor = Predictor(model, Compute(device, cast, torch.channels_last), mask_format="bool")
                with tf32(allow):
                    rows[f"{form}, {kind}, batch {count}"] = _speed(
                        lambda p=predictor, b=batch: _both(p, b), count, device
                    )
    return {"model": name, "size": size, **rows}


def _both(predictor: Predictor, batch: dict[str, Tensor]) -> None:
    predictor.launch(batch)
    predictor.collect()


SMALL = ("solov2_light_r18_fpn_3x", (64, 96), (1, 2))


def _is_large(device: torch.device) -> bool:
    return device.type != "cpu"


def _speed(step: Callable[[], Any], images: int, device: torch.device) -> dict[str, float | None]:
    """Warm up, then queue steps and wait once."""
    warmup, count = (5, 20) if _is_large(device) else (1, 2)
    if _is_large(device):
        torch.accelerator.reset_peak_memory_stats(device)
    for _ in range(warmup):
        step()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(count):
        step()
    synchronize(device)
    seconds = time.perf_counter() - started
    peak = torch.accelerator.max_memory_allocated(device) / 2**20 if _is_large(device) else None
    return {"images_per_second": images * count / seconds, "ms": 1000 * seconds / count, "peak_mib": peak}


def check_quickstart(device: torch.device) -> dict[str, Any]:
    """The main job from end to end; at small sizes two epochs of it."""
    settings = [] if _is_large(device) else [*SETTINGS, "train.epochs=2"]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        result = solov2.train(
            load_config("quickstart", settings), data=f"{folder}/shapes", output=f"{folder}/run", device=str(device)
        )
        return {"seconds": time.perf_counter() - started, **result.metrics}


ITEMS: dict[str, Callable[[torch.device], dict[str, Any]]] = {
    "environment": check_environment,
    "parity": check_parity,
    "step": check_step,
    "training": check_training,
    "inference": check_inference,
    "quickstart": check_quickstart,
}


def main(argv: list[str] | None = None) -> int:
    """Run the items; returns 0 where all of them worked, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ITEMS, default=list(ITEMS), metavar="ITEM", help=", ".join(ITEMS))
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), metavar="DIR", help="default: gpu_check/")
    parser.add_argument("--device", help="default: the accelerator, if there is one")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if len(args.only) == 1:
        return _run_here(args.only[0], args.out, args.device)
    for item in args.only:
        command = [sys.executable, __file__, "--only", item, "--out", str(args.out)]
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
    except Exception as error:  # whatever it is, it is this item's result
        found = {"error": f"{type(error).__name__}: {error}"}
    _write(folder, item, {**found, "item_seconds": round(time.perf_counter() - started, 1)})
    return 1 if "error" in found else 0


def _write(folder: Path, item: str, found: dict[str, Any]) -> None:
    (folder / f"{item}.json").write_text(json.dumps(found, indent=1) + "\n")


def _show_table(folder: Path, items: list[str]) -> int:
    failed = 0
    for item in items:
        path = folder / f"{item}.json"
        found = json.loads(path.read_text()) if path.is_file() else {"error": "the process ended without a result"}
        failed += "error" in found
        print(f"{item}:")
        for name, value in found.items():
            if isinstance(value, dict):
                value = "  ".join(f"{k} {v:.4g}" for k, v in value.items() if v is not None)
            print(f"  {name:<44}{value:.4g}" if isinstance(value, float) else f"  {name:<44}{value}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
