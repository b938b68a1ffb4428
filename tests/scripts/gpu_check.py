"""Check an accelerator: the same results as on the CPU, no waiting inside a training step, speed and memory.

    python tests/scripts/gpu_check.py [--only ITEM ...] [--out DIR] [--device NAME] [--compare DIR] [--peer DIR PYTHON]

Every item runs in its own process and has its own time limit, so that a failure, a hang or a broken device context does
not affect the others. It writes each row to DIR/ITEM.json as soon as it is there, and the item's table is printed when
it has ended, with --compare beside that of an earlier call. Without --only, the items that take a few minutes together
run. On a CPU the same items run at small sizes.

The item `reference` times mmdetection beside this library. DIR is a folder with its driver `peer.py`, which is not part
of this repository, and PYTHON the interpreter of an environment with mmdetection 3.3; by default they are taken from
SOLOV2_PEER_DIR and SOLOV2_PEER_PYTHON. Its focal loss is computed by torch, because mmcv is not compiled there.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / part) for part in ("", "scripts", "peer"))]

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
from helpers.tiny_panoptic import panoptic_config  # noqa: E402
from helpers.tiny_runs import SETTINGS, random_batch, tiny_config  # noqa: E402
from kill_runs import differences  # noqa: E402
from on_device import compare_on_device  # noqa: E402

import solov2  # noqa: E402
from solov2 import distributed  # noqa: E402
from solov2.benchmarking.measure import seconds_of  # noqa: E402
from solov2.benchmarking.peak import convolution_peak  # noqa: E402
from solov2.benchmarking.synthetic import ellipses, synthetic_raw  # noqa: E402
from solov2.build import build_assigner, build_criterion, construct, prepare_for_training  # noqa: E402
from solov2.checkpoint import load_file  # noqa: E402
from solov2.compute import Compute, has_graphs, select_device, select_precision, synchronize  # noqa: E402
from solov2.config import Config, load_config  # noqa: E402
from solov2.data.build import prepare_data, training_dataset, training_loader  # noqa: E402
from solov2.data.categories import default_class_names  # noqa: E402
from solov2.models.solov2 import SOLOv2  # noqa: E402
from solov2.ops.matrix_nms import matrix_nms  # noqa: E402
from solov2.ops.resize import resize_image  # noqa: E402
from solov2.predict import Predictor  # noqa: E402
from solov2.training.environment import environment  # noqa: E402
from solov2.training.guard import NonFiniteGuard  # noqa: E402
from solov2.training.optim import WeightAverage, build_optimizer  # noqa: E402
from solov2.training.signals import STOPPED  # noqa: E402
from solov2.training.step import take_step  # noqa: E402

CPU = torch.device("cpu")
PRECISIONS = ("float32", "tf32", "bf16", "fp16")
PEER = ("SOLOV2_PEER_DIR", "SOLOV2_PEER_PYTHON")
START = 30  # seconds to import torch and to wake the device, beyond the limit of an item


class Rows(dict[str, Any]):
    """The results of an item so far, which are written to its file with every new row."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self.path.write_text(json.dumps(self, indent=1) + "\n")

    def __ior__(self, found: dict[str, Any]) -> Rows:  # type: ignore[override]  # nothing else is added here
        for name, value in found.items():
            self[name] = value
        return self


def check_environment(device: torch.device, rows: Rows) -> None:
    """Machine and versions."""
    rows |= environment(device)
    rows["cuda"] = torch.version.cuda
    rows["cudnn"] = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    rows["date"] = time.strftime("%Y-%m-%d")


def check_ceilings(device: torch.device, rows: Rows) -> None:
    """What the device reaches at best: GB/s of a copy, TFLOP/s of matrix products and of 3x3 convolutions."""
    side = 256 if device.type == "cpu" else 8192
    source = torch.empty(side * side, device=device)
    target = torch.empty_like(source)
    rows["copy, GB/s"] = 8 * source.numel() / _seconds(partial(target.copy_, source), device) / 1e9
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        square = torch.randn(side, side, device=device, dtype=dtype)
        rows[f"product {name}, TFLOP/s"] = 2 * side**3 / _seconds(partial(torch.mm, square, square), device) / 1e12
    for precision in PRECISIONS[:3]:
        best = convolution_peak(Compute(device, select_precision(precision, device)))["gflop_per_second"]
        rows[f"convolution {precision}, TFLOP/s"] = best / 1000


def _seconds(step: Callable[[], Any], device: torch.device, count: int = 10) -> float:
    step()  # warms up
    return seconds_of(step, device, count)


# ---- the same results as on the CPU


def check_parity(device: torch.device, rows: Rows) -> None:
    """Maximum differences from the CPU in float32, without TF32, for the stored reference cases in tests/data."""
    with Compute(device, "float32").arithmetic():
        rows |= _network_parity(device)
        rows["losses and their gradients"] = max(_loss_difference(case, device) for case in BATCHES.values())
        rows |= _postprocess_parity(device)
        rows["Matrix NMS"] = max(_nms_difference(name, device) for name in NMS_SETS)
        rows["resized pixels"] = _resize_difference(device)


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


def _resize_difference(device: torch.device) -> float:
    image = torch.randint(256, (3, 97, 131), dtype=torch.uint8)
    sizes = (161, 200), (50, 77)
    return max(difference(resize_image(image.to(device), size), resize_image(image, size)) for size in sizes)


# ---- the training step


class Training:
    """A model with everything a training step needs, as in `solov2.train`, and a synthetic batch."""

    def __init__(self, config: Config, compute: Compute, images: int, size: tuple[int, int]) -> None:
        torch.manual_seed(0)
        self.compute, self.scaler = compute, compute.scaler()
        model = construct(config.model, default_class_names(config.model.num_classes))
        self.model = prepare_for_training(model, config, compute).train()
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


def check_step(device: torch.device, rows: Rows) -> None:
    """Losses of real training steps with weight average and guard; raises if the host waits for the device."""
    for precision in ("float32", "bf16", "fp16"):
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
        assert precision == "fp16" or guard.failure(now=True) is None, f"a step in {precision} was not finite"
        rows[precision] = {name: loss.item() for name, loss in losses.items()}
    rows["waits of a step"] = 0 if device.type == "cuda" else None
    rows["waits of a prediction"] = _waits(device)


def _waits(device: torch.device, name: str = "solov2_r50_fpn_1x") -> dict[str, int] | None:
    """How often the host waits for the device between an image and its RLEs, by module; None where unknown.

    A panoptic model also makes its segments.
    """
    if device.type != "cuda":
        return None
    model = lively(solov2.build_model(name, device=device))
    image = torch.randint(256, (3, 480, 640), dtype=torch.uint8)
    predict = model.predict if model.semantic_head is None else model.predict_panoptic
    predict(image, mask_format="rle")
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            predict(image, mask_format="rle")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return _by_module(caught)


def _by_module(caught: Sequence[warnings.WarningMessage]) -> dict[str, int]:
    """The number of warnings about waiting for a device: all of them, and by the module that waited."""
    modules = [Path(warning.filename).stem for warning in caught if "synchroniz" in str(warning.message)]
    return {"all": len(modules), **Counter(modules)}


def check_overflow(device: torch.device, rows: Rows) -> None:
    """fp16 with a loss scale that overflows: the step is skipped, the scale falls, and the next steps succeed."""
    config, size, counts = _workload(device, (192, 192), (1, 2), name="quickstart")
    training = Training(config, Compute(device, "fp16", torch.channels_last), counts[-1], size)
    training.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40)
    before, scales, statuses = copy.deepcopy(training.model.state_dict()), [], []
    for _ in range(60):
        statuses.append(int(training.step()[1]))
        scales.append(training.scaler.get_scale())
        if not statuses[-1]:
            break
        state = training.model.state_dict()
        assert all(torch.equal(before[name], state[name]) for name in before), "a skipped step changed the model"
    assert statuses[0] and not statuses[-1], f"steps {statuses} at scales {scales}"
    rows |= {"skipped": len(statuses) - 1, "scale": scales[-1]}


def check_process_group(device: torch.device, rows: Rows) -> None:
    """A real step inside a process group of one, with DistributedDataParallel around the model."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    losses = []
    plain = Training(load_config("quickstart"), Compute(device), 2, (192, 192))
    losses.append(plain.step()[0])
    with distributed.process_group(device):
        training = Training(load_config("quickstart"), Compute(device), 2, (192, 192))
        devices = None if device.type == "cpu" else [device.index or 0]
        network = DistributedDataParallel(training.model, device_ids=devices)
        losses.append(
            take_step(
                network, training.criterion, [training.batch], training.optimizer, training.scaler, training.compute,
                clip_norm=35.0,
            )[0]
        )  # fmt: skip
        gathered, backend = distributed.gather_objects("here"), distributed.backend(device)
    apart = max(relative_difference(losses[1][name], losses[0][name]) for name in losses[0])
    assert gathered == ["here"] and apart < 1e-3, f"losses differ by {apart}"
    rows |= {"backend": backend, "relative difference of the losses": apart}


def check_sync_batch_norm(device: torch.device, rows: Rows) -> None:
    """Synchronized batch norms of two processes that share the device, against one process with both images."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_normalize_half, args=(str(device), folder), nprocs=2)
        halves = [torch.load(f"{folder}/{rank}.pth", weights_only=True) for rank in range(2)]
    network = _network_with_batch_norms(device)
    with Compute(device, "float32").arithmetic():
        raw = raw_tensors(network(_images_of_both(device)))
        sum(tensor.square().mean() for tensor in raw).backward()
    whole = {name: value.grad.cpu() for name, value in network.named_parameters() if value.grad is not None}
    outputs = [torch.cat(pair) for pair in zip(*(half["raw"] for half in halves), strict=True)]
    means = {name: (halves[0]["grad"][name] + halves[1]["grad"][name]) / 2 for name in whole}
    largest = max(value.abs().max().item() for value in whole.values())
    rows |= {
        "raw outputs": max(map(relative_difference, outputs, raw)),
        "weight gradients": max(difference(means[name], whole[name]) for name in whole) / largest,
        "statistics": max(difference(halves[0]["buffers"][name], value) for name, value in network.named_buffers()),
    }
    assert max(rows.values()) < 1e-3, rows


def _network_with_batch_norms(device: torch.device) -> SOLOv2:
    config = tiny_config("model.frozen_batch_norm=false", "model.head_norm=batch", "train.sync_batch_norm=true")
    torch.manual_seed(0)
    model = construct(config.model, default_class_names(config.model.num_classes))
    return prepare_for_training(model, config, Compute(device, "float32")).train()


def _images_of_both(device: torch.device) -> Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)).to(device)


def _normalize_half(rank: int, device: str, folder: str) -> None:
    """One of two processes of a group on one device, which gloo allows and nccl does not."""
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    here = torch.device(device)
    with Compute(here, "float32").arithmetic():
        network = _network_with_batch_norms(here)
        raw = raw_tensors(network(_images_of_both(here)[rank : rank + 1]))
        sum(tensor.square().mean() for tensor in raw).backward()
    result = {
        "raw": [tensor.detach().cpu() for tensor in raw],
        "grad": {name: value.grad.cpu() for name, value in network.named_parameters() if value.grad is not None},
        "buffers": {name: value.cpu() for name, value in network.named_buffers()},
    }
    torch.save(result, f"{folder}/{rank}.pth")
    torch.distributed.destroy_process_group()


def check_panoptic(device: torch.device, rows: Rows) -> None:
    """Panoptic models: the same segments as on the CPU, waits of a prediction, and images per second."""
    torch.manual_seed(0)
    model = lively(solov2.build_model(panoptic_config()))
    image = torch.randint(256, (3, 120, 150), dtype=torch.uint8)
    results = []
    for place in (CPU, device):
        results += copy.deepcopy(model).to(place).predict_panoptic(image, precision="float32")
    maps = [result["panoptic_map"].cpu() for result in results]
    rows["pixels of another segment"] = (maps[0] != maps[1]).double().mean().item()
    rows["segments"] = [len(result["segments"]) for result in results]
    name = "solov2_panoptic_r50_fpn_1x"
    rows["waits of a prediction"] = _waits(device, name)
    config, size, counts = _workload(device, (800, 1088), (1, 8), name=name)
    config = panoptic_config() if device.type == "cpu" else config
    plain = lively(solov2.build_model(config, device=device)).to(memory_format=torch.channels_last)
    for precision in ("tf32", "bf16"):
        for kind in ("bool", "rle"):
            compute = Compute(device, precision, torch.channels_last)
            predictor = Predictor(plain, compute, mask_format=kind, panoptic=True)
            for count in counts:
                rows[f"{precision}, {kind}, batch {count}"] = _prediction_speed(predictor, _batch(count, size))


def check_deterministic(device: torch.device, rows: Rows) -> None:
    """A deterministic run, once undisturbed and once stopped by SIGTERM and resumed: equal to the bit."""
    words = ["quickstart", *(word for setting in SETTINGS for word in ("--set", setting))]
    words += [
        "--set",
        "train.epochs=4",
        "--set",
        "train.checkpoint_steps=0",
        "--deterministic",
        "--device",
        str(device),
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, str(ROOT / "train.py"), *words, "--data-root", str(folder / "shapes"), "--output"]
        subprocess.run([*command, str(folder / "whole")], check=True, capture_output=True)
        process = subprocess.Popen([*command, str(folder / "cut")], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch 2  step"):
                process.send_signal(signal.SIGTERM)
                break
        process.communicate()
        subprocess.run([*command, str(folder / "cut"), "--resume"], check=True, capture_output=True)
        found = [load_file(folder / run / "last.pth") for run in ("whole", "cut")]
    different = differences(*found)
    assert process.returncode == STOPPED and not different, f"exit code {process.returncode}, different: {different}"
    rows |= {"exit code after SIGTERM": process.returncode, "different entries": len(different)}


# ---- speed and memory


def check_training(device: torch.device, rows: Rows) -> None:
    """Images per second of queued training steps, and their peak memory."""
    _training(device, rows, PRECISIONS, (2, 16))


def check_large_batches(device: torch.device, rows: Rows) -> None:
    """The same with large batches, and what the end of memory looks like."""
    _training(device, rows, ("bf16",), (32, 64, 128))


def check_recomputing(device: torch.device, rows: Rows) -> None:
    """The same with activations that are computed again in the backward pass."""
    changes = ("train.recompute_activations=true", "model.frozen_batch_norm=true", "model.head_norm=group")
    _training(device, rows, ("bf16",), (2, 16), *changes)


def _training(
    device: torch.device, rows: Rows, precisions: Sequence[str], counts: tuple[int, ...], *changes: str
) -> None:
    config, size, counts = _workload(device, (800, 1344), counts, *changes)
    rows |= {"model": config.name, "size": size}
    for precision in precisions:
        for count in counts:
            training = Training(config, Compute(device, precision, torch.channels_last), count, size)
            rows[f"{precision}, batch {count}"] = _speed(training.step, count, device)


def check_inference(device: torch.device, rows: Rows) -> None:
    """Images per second from padded pixels to 480 x 640 masks, of R50; random weights find max_instances instances."""
    _inference(device, rows, "solov2_r50_fpn_1x", (800, 1088), PRECISIONS[:3])


def check_light_inference(device: torch.device, rows: Rows) -> None:
    """The same of the light R50 at 448 x 768."""
    _inference(device, rows, "solov2_light_r50_fpn_3x", (448, 768), ("tf32", "bf16"))


def check_compiled_inference(device: torch.device, rows: Rows) -> None:
    """The same of R50 with `optimize(compile=True)`."""
    _inference(device, rows, "solov2_r50_fpn_1x", (800, 1088), ("bf16",), compile=True)


def _inference(
    device: torch.device,
    rows: Rows,
    name: str,
    size: tuple[int, int],
    precisions: Sequence[str],
    *,
    compile: bool = False,
) -> None:
    config, size, counts = _workload(device, size, (1, 8), name=name)
    rows |= {"model": config.name, "size": size}
    torch.manual_seed(0)
    plain = lively(solov2.build_model(config, device=device)).to(memory_format=torch.channels_last)
    for precision in precisions:
        half = precision == "bf16"
        fast = plain.optimize(precision="bf16" if half else "float32", compile=compile)
        # Its weights are cast to bf16, so it needs no autocast.
        for kind, model, cast in (("plain", plain, precision), ("optimized", fast, "tf32" if half else precision)):
            predictor = Predictor(model, Compute(device, cast, torch.channels_last), mask_format="bool")
            for count in counts:
                rows[f"{precision}, {kind}, batch {count}"] = _prediction_speed(predictor, _batch(count, size))
    if has_graphs(device) and not compile:  # last: after a graph that fails, the device may be of no more use
        rows["bf16, graphs, batch 1"] = _graphs_speed(plain, _batch(1, size), device)


def _prediction_speed(predictor: Predictor, batch: dict[str, Tensor]) -> dict[str, Any]:
    found, count, device = _predict(predictor, batch)[0], len(batch["pixels"]), predictor.compute.device
    return {
        **_speed(partial(_predict, predictor, batch), count, device),
        "network_ms": _speed(partial(_network, predictor, batch), count, device)["ms"],
        "instances": len(found["scores"]),
    }


def _graphs_speed(plain: SOLOv2, batch: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
    """The same with `optimize(graphs=True)`, and the difference of its raw outputs from those without graphs.

    Any error is the result, so that it does not hide the other figures.
    """
    compute = Compute(device, "tf32", torch.channels_last)
    try:
        fast = plain.optimize(precision="bf16", graphs=True)
        row = _prediction_speed(Predictor(fast, compute, mask_format="bool"), batch)
        other = compute.move(_batch(1, batch["pixels"].shape[2:]))  # other pixels than those recorded
        with torch.no_grad(), compute.arithmetic():
            images = compute.images(fast, other)
            pair = [raw_tensors(model(images)) for model in (fast, copy.deepcopy(fast))]  # copies have no graphs
        return {**row, "difference": max(map(relative_difference, *pair))}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def _batch(count: int, size: tuple[int, int]) -> dict[str, Tensor]:
    pixels = torch.randint(256, (count, 3, *size), dtype=torch.uint8)
    sizes, original_sizes = (torch.tensor([pair] * count) for pair in (size, (480, 640)))
    return {"pixels": pixels, "sizes": sizes, "original_sizes": original_sizes}


def _network(predictor: Predictor, batch: dict[str, Tensor]) -> None:
    predictor.launch(batch)
    predictor._launched.clear()


def check_postprocess(device: torch.device, rows: Rows) -> None:
    """Matrix NMS and post-processing with 500 and 2,000 candidates, to two sizes, as masks and as RLEs."""
    config, size, _ = _workload(device, (800, 1344), (1, 1))
    counts = (20, 50) if device.type == "cpu" else (500, 2000)
    targets = ((48, 64), (300, 400)) if device.type == "cpu" else ((480, 640), (3000, 4000))
    model, generator = solov2.build_model(config, device=device).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        raw = model(torch.zeros(1, 3, *size, device=device))
    for count in counts:
        masks = ellipses(count, *(side // 4 for side in size), generator).to(device) > 0
        labels, scores = torch.zeros(count, dtype=torch.int64), torch.linspace(0.9, 0.1, count)
        step = partial(matrix_nms, masks, labels.to(device), scores.to(device))
        rows[f"Matrix NMS of {count} masks, ms"] = 1000 * _seconds(step, device)
        made = synthetic_raw(raw, count, generator)
        for target in targets:
            for kind in ("bool", "rle"):
                step = partial(model.postprocess, made, [size], [target], mask_format=kind, max_candidates=count)
                name = f"post-processing, {count} candidates, to {target[0]} x {target[1]} as {kind}, ms"
                rows[name] = 1000 * _seconds(step, device, 3)


def check_profile(device: torch.device, rows: Rows) -> None:
    """Where the time of a training step goes: the most expensive kernels and the share in which the device is busy."""
    config, size, counts = _workload(device, (800, 1344), (2, 16))
    training = Training(config, Compute(device, "bf16", torch.channels_last), counts[-1], size)
    for _ in range(3):
        training.step()
    synchronize(device)
    with torch.profiler.profile(activities=torch.profiler.supported_activities()) as profiler:
        started = time.perf_counter()
        for _ in range(3):
            training.step()
        synchronize(device)
        seconds = time.perf_counter() - started
    on_device = device.type != "cpu"
    times = {row.key: row.self_device_time_total if on_device else row.self_cpu_time_total for row in
             profiler.key_averages() if not on_device or row.device_type != DeviceType.CPU}  # fmt: skip
    total = sum(times.values())
    top = sorted(times, key=lambda name: -times[name])[:25]
    rows |= {"busy": total / 1e6 / seconds, **{name[:60]: times[name] / max(total, 1e-9) for name in top}}


def check_loader(device: torch.device, rows: Rows) -> None:
    """Images per second of the training loader on generated images, by number of workers."""
    counts = (1,) if device.type == "cpu" else (1, 2, 8, 16)
    changes = (*SETTINGS, "data.shapes_train=64") if device.type == "cpu" else (
        "data.shapes_size=640", "data.shapes_train=512", "data.train_scales=[800]", "data.train_long_edge=1333",
        "train.batch_size=16",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for workers in counts:
            config = load_config("quickstart", [*changes, f"data.workers={workers}", f"data.root={folder}/shapes"])
            prepare_data(config, splits=["train"])
            loader, sampler = training_loader(
                config, training_dataset(config), build_assigner(config.model), device=device
            )
            started, first = 0.0, 0
            for number, _ in enumerate(loader):
                if number == 1:  # the workers have started
                    started, first = time.perf_counter(), number
            seconds = time.perf_counter() - started
            rows[f"{workers} workers, images/s"] = (len(sampler) - 1 - first) * config.train.batch_size / seconds


def _predict(predictor: Predictor, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
    predictor.launch(batch)
    return predictor.collect()


def _workload(
    device: torch.device, size: tuple[int, int], counts: tuple[int, ...], *changes: str, name: str = "solov2_r50_fpn_1x"
) -> tuple[Config, tuple[int, int], tuple[int, ...]]:
    """Configuration, input size and images per batch: as given for an accelerator, tiny ones for a CPU."""
    if device.type == "cpu":
        return tiny_config(*changes), (64, 96), (1, 2)
    return load_config(name, list(changes)), size, counts


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


def check_reference(device: torch.device, rows: Rows) -> None:
    """Times of mmdetection and of this library, see tests/peer/on_device.py."""
    folder, python = (os.environ.get(name, "") for name in PEER)
    if not Path(folder, "peer.py").is_file() or shutil.which(python) is None:
        rows["reference"] = "not timed: give --peer DIR PYTHON, see the top of gpu_check.py"
        return
    small = {"config": "solov2_light_r18", "size": (64, 96), "counts": (1, 2), "warm_ups": 1, "iterations": 1}
    rows |= compare_on_device(device, folder, python, **(small if device.type == "cpu" else {}))


def check_quickstart(device: torch.device, rows: Rows) -> None:
    """The quickstart end to end; on a CPU, two epochs at a small size."""
    tiny = [*SETTINGS, "train.epochs=2"]
    config = load_config("quickstart", tiny if device.type == "cpu" else ["data.workers=auto"])
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        result = solov2.train(config, data=f"{folder}/shapes", output=f"{folder}/run", device=str(device))
        seconds = time.perf_counter() - started
    rows |= {"seconds": seconds, **{name: result.metrics[name] for name in ("segm_AP", "segm_AP50", "bbox_AP")}}


# ---- one process per item

Check = Callable[[torch.device, Rows], None]
ITEMS: dict[str, tuple[Check, float]] = {  # with their limit in seconds; in the order of what is needed most
    "environment": (check_environment, 30),
    "ceilings": (check_ceilings, 45),
    "parity": (check_parity, 60),
    "step": (check_step, 60),
    "training": (check_training, 90),
    "inference": (check_inference, 60),
    "light_inference": (check_light_inference, 45),
    "postprocess": (check_postprocess, 60),
    "profile": (check_profile, 45),
    "loader": (check_loader, 60),
}
OTHERS: dict[str, tuple[Check, float]] = {  # run by --only
    "overflow": (check_overflow, 60),
    "process_group": (check_process_group, 60),
    "sync_batch_norm": (check_sync_batch_norm, 60),
    "panoptic": (check_panoptic, 90),
    "deterministic": (check_deterministic, 180),
    "recomputing": (check_recomputing, 90),
    "large_batches": (check_large_batches, 120),
    "compiled_inference": (check_compiled_inference, 240),
    "reference": (check_reference, 240),
    "quickstart": (check_quickstart, 400),
}


def main(argv: list[str] | None = None) -> int:
    """Run the items; returns 0 if all of them succeeded, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = ITEMS | OTHERS
    parser.add_argument("--only", nargs="+", choices=every, default=list(ITEMS), metavar="ITEM", help=", ".join(every))
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), metavar="DIR", help="default: gpu_check/")
    parser.add_argument("--device", help="default: the accelerator, if there is one")
    parser.add_argument("--compare", type=Path, metavar="DIR", help="also show the results of an earlier call")
    parser.add_argument(
        "--peer", nargs=2, metavar=("DIR", "PYTHON"), help="of the reference; default: " + ", ".join(PEER)
    )
    parser.add_argument("--here", choices=every, help=argparse.SUPPRESS)  # set by main for the process of an item
    args = parser.parse_args(argv)
    if args.here:
        return _run_here(args.here, args.out, args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    environ = os.environ | dict(zip(PEER, args.peer or ()))
    for item in args.only:
        path = args.out / f"{item}.json"
        path.unlink(missing_ok=True)  # of an earlier call
        command = [sys.executable, __file__, "--here", item, "--out", str(args.out)]
        command += ["--device", args.device] if args.device else []
        try:
            subprocess.run(command, timeout=every[item][1] + START, check=False, env=environ)
        except subprocess.TimeoutExpired:
            rows = {**_read(path), "error": f"took longer than {every[item][1]} seconds"}
            path.write_text(json.dumps(rows, indent=1) + "\n")
        _show(item, _read(path), _read(args.compare / path.name) if args.compare else {})
    return int(any(_failed(_read(args.out / f"{item}.json")) for item in args.only))


def _run_here(item: str, folder: Path, device: str | None) -> int:
    started, rows = time.perf_counter(), Rows(folder / f"{item}.json")
    try:
        check, _ = (ITEMS | OTHERS)[item]
        check(select_device(device), rows)
    except Exception as error:  # any error is a result of its item
        traceback.print_exc()
        rows["error"] = f"{type(error).__name__}: {error}"
    rows["item_seconds"] = round(time.perf_counter() - started, 1)
    return int(_failed(rows))


def _failed(rows: dict[str, Any]) -> bool:
    """Whether the item or one of its rows failed."""
    return any("error" in part for part in (rows, *rows.values()) if isinstance(part, dict))


def _read(path: Path) -> dict[str, Any]:
    """The rows of an item, those before an error included."""
    return json.loads(path.read_text()) if path.is_file() else {"error": "the process ended without a result"}


def _show(item: str, rows: dict[str, Any], before: dict[str, Any]) -> None:
    print(f"{item}:")
    for name, value in rows.items():
        earlier = f"   before: {_words(before[name])}" if name in before else ""
        print(f"  {name:<44}{_words(value)}{earlier}", flush=True)


def _words(value: Any) -> str:
    parts = value if isinstance(value, dict) else {"": value}
    return "  ".join(f"{key} {_short(part)}".strip() for key, part in parts.items() if part is not None)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
