"""Times this library beside mmdetection on any device: same weights, image and ground truth, one after the other.

`python tests/scripts/gpu_check.py --only reference --peer PEER_DIR PEER_PYTHON` calls it.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare import Peer, load_ours
from torch import Tensor

from solov2.benchmarking.measure import seconds_of
from solov2.build import build_assigner, build_criterion, prepare_for_training
from solov2.compute import Compute
from solov2.config import load_config
from solov2.models.solov2 import SOLOv2
from solov2.training.optim import build_optimizer
from solov2.training.step import take_step


class LoggedPeer(Peer):
    """The reference's process, whose errors end up in `log`."""

    def __init__(self, folder: str, python: str, log: Path) -> None:
        command = [python, str(Path(__file__).with_name("peer_worker.py")), folder, str(torch.get_num_threads())]
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )

    def close(self) -> None:
        """End the process, which may have failed."""
        self.process.kill()
        self.process.wait()


def compare_on_device(
    device: torch.device,
    peer_folder: str,
    peer_python: str,
    *,
    config: str = "solov2_r50",
    size: tuple[int, int] = (800, 1216),
    counts: tuple[int, ...] = (1, 8),
    training_count: int = 2,
    warm_ups: int = 5,
    iterations: int = 20,
) -> dict[str, Any]:
    """Milliseconds per batch of both sides in float32 (TF32 on an NVIDIA card), of ours also in bf16, and the ratios.

    Args:
        device: of both networks.
        peer_folder, peer_python: folder of peer.py, and the interpreter of its environment.
        config: the reference's name of a network.
        size: (height, width) of the image.
        counts: images per batch of the network alone and of the network with post-processing to masks of that size.
        training_count: images per batch of a training step, target assignment included.
        warm_ups, iterations: steps that do not count, and that do.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "peer.log"
        peer = LoggedPeer(peer_folder, peer_python, log)
        try:
            peer.setup(config=config, size=size, candidates=500, folder=folder, device=str(device))
            measure = partial(_milliseconds, peer, device, warm_ups, iterations)
            return {
                **_inference(peer, measure, device, config, folder, counts),
                **_training(peer, measure, device, config, folder, training_count),
            }
        except (RuntimeError, BrokenPipeError) as error:
            raise RuntimeError(f"{error}: {log.read_text()[-2000:]}") from error
        finally:
            peer.close()


def _milliseconds(
    peer: Peer,
    device: torch.device,
    warm_ups: int,
    iterations: int,
    what: str,
    images: int,
    steps: dict[str, Callable[[], Any]],
) -> dict[str, float]:
    """Of the reference's step `what` and of our steps, with the reference's time / ours."""
    theirs = peer.speed(what=what, images=images, warm_ups=warm_ups, iterations=iterations)["seconds"]
    row = {"reference_ms": 1000 * theirs}
    for name, step in steps.items():
        for _ in range(warm_ups):
            step()
        ours = seconds_of(step, device, iterations)
        row |= {f"{name}_ms": 1000 * ours, f"{name}_ratio": theirs / ours}
    return row


def _inference(
    peer: Peer,
    measure: Callable[..., dict[str, float]],
    device: torch.device,
    config: str,
    folder: str,
    counts: tuple[int, ...],
) -> dict[str, Any]:
    """Normalized images to raw outputs, and to boolean masks."""
    model, images, sizes = load_ours(config, folder)
    compute = Compute(device, "tf32", torch.channels_last)
    plain = compute.place(model.eval())
    forms = {"plain": plain, "optimized": plain.optimize(), "bf16": plain.optimize(precision="bf16")}
    images = images.to(device, memory_format=torch.channels_last)

    @torch.no_grad()
    def run(network: SOLOv2, inputs: Tensor, postprocess: bool) -> list[dict[str, Any]]:
        raw, pairs = network(inputs), sizes.expand(len(inputs), -1)
        return network.postprocess(raw, pairs, pairs) if postprocess else []

    rows: dict[str, Any] = {}
    with compute.arithmetic():
        theirs, (ours,) = peer.infer(), run(plain, images, True)
        rows["instances"] = {"reference": theirs["found"], "plain": len(ours["scores"])}
        rows["sum of scores"] = {"reference": theirs["score_sum"], "plain": ours["scores"].sum().item()}
        for count in counts:
            inputs = images.repeat(count, 1, 1, 1).contiguous(memory_format=torch.channels_last)
            for what in ("network", "inference"):
                steps = {name: partial(run, form, inputs, what == "inference") for name, form in forms.items()}
                rows[f"{what}, batch {count}"] = measure(what, count, steps)
    return rows


def _training(
    peer: Peer, measure: Callable[..., dict[str, float]], device: torch.device, config: str, folder: str, count: int
) -> dict[str, Any]:
    """A training step from pixels and instance masks on the host to new weights."""
    settings, compute = load_config(f"{config}_fpn_3x"), Compute(device, "tf32", torch.channels_last)
    model = prepare_for_training(load_ours(config, folder)[0], settings, compute).train()
    assigner, criterion, scaler = build_assigner(settings.model), build_criterion(settings.model), compute.scaler()
    optimizer = build_optimizer(
        model, name="sgd", learning_rate=1e-5, momentum=0.9, weight_decay=1e-4, decay_norms=True
    )
    peer.truth(instances=8, file=f"{folder}/truth.npz")
    with np.load(f"{folder}/truth.npz") as file:
        truth = {key: torch.from_numpy(file[key]) for key in ("boxes", "labels", "masks")}
    pixels = torch.load(f"{folder}/image.pth", weights_only=True)["image"].flip(0).repeat(count, 1, 1, 1)
    batch = {"pixels": pixels, "sizes": torch.tensor([pixels.shape[2:]] * count)}

    def step() -> dict[str, Tensor]:
        targets = assigner([truth] * count, tuple(pixels.shape[2:]))
        losses, _ = take_step(
            model, criterion, [{**batch, "targets": targets}], optimizer, scaler, compute, clip_norm=35.0
        )
        return losses

    theirs, ours = peer.train(images=count)["losses"], step()
    pairs = (("loss_cls", "loss_category"), ("loss_mask", "loss_mask"))
    difference = max(abs(ours[own].item() / theirs[other] - 1) for other, own in pairs)
    return {
        "relative difference of losses": difference,
        f"training, batch {count}": measure("training", count, {"plain": step}),
    }
