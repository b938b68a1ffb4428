"""Print the differences from the stored results of the reference, by group, in float64 and in float32.

    python tests/scripts/parity_table.py [--quick]

All seven models take about 15 minutes on two cores; --quick omits the full-width ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.parity import (  # noqa: E402
    BATCHES,
    FORWARD,
    NMS_SETS,
    POSTPROCESS_CASES,
    criterion_of,
    decode,
    network_input,
    postprocess_case,
    reference_model,
    run_network,
    sampled_outputs,
    stored_batch,
    stored_decay,
    stored_set,
)
from helpers.training_parity import (  # noqa: E402
    SCENES,
    SCHEDULES,
    TARGETS,
    TRAJECTORIES,
    assert_targets,
    start_of_trajectory,
    stored_schedule,
    trajectory_steps,
)

from solov2.ops.matrix_nms import matrix_nms  # noqa: E402

TYPES = {"float64": torch.float64, "float32": torch.float32}
GROUPS = {"C": "features C2..C5", "P": "pyramid P2..P5", "cls": "category logits", "kernel": "kernels",
          "mask_feats": "mask features"}  # fmt: skip
Row = tuple[str, str, str]  # group, measure, figure


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="light models only")
    args = parser.parse_args()
    torch.backends.mkldnn.enabled = False  # its float32 convolutions are less accurate than those of the reference run
    print(f"{'group':<40}{'dtype':<9}{'measure':<44}figure")
    for name, dtype in TYPES.items():
        for rows in (forward(dtype, args.quick), targets(), losses(dtype), instances(dtype), decay(dtype),
                     trajectories(dtype, args.quick), schedules()):  # fmt: skip
            for group, measure, figure in rows:
                print(f"{group:<40}{name:<9}{measure:<44}{figure}", flush=True)
    return 0


def forward(dtype: torch.dtype, quick: bool) -> Iterator[Row]:
    """Maximum difference of each kind of output, divided by its standard deviation; then the final instances."""
    for config, stored in FORWARD.items():
        if quick and "light" not in config:
            continue
        model = reference_model(config, stored["overrides"]).to(dtype)
        outputs, raw = run_network(model, network_input(**stored["input"]).to(dtype))
        worst = dict.fromkeys(GROUPS, 0.0)
        for name, wanted in sampled_outputs(config).items():
            entry = stored["outputs"][name]
            found = outputs[name].double().flatten()[:: entry["stride"]]
            kind = name.rstrip("0123456789")
            worst[kind] = max(worst[kind], ((found - wanted[: len(found)]).abs().max() / entry["std"]).item())
        for kind, difference in worst.items():
            yield f"{config}: {GROUPS[kind]}", "largest difference / standard deviation", f"{difference:.1e}"
        metas = stored["predict"]["metas"]
        results = model.postprocess(raw, [m["img_shape"] for m in metas], [m["ori_shape"] for m in metas])
        yield f"{config}: prediction", *compare_instances(zip(results, stored["predict"]["results"]))


def targets() -> Iterator[Row]:
    """Number of scenes whose cells, labels, positives or masks differ in any way."""
    wrong = total = 0
    for ranges in TARGETS["scale_ranges"]:
        for scene in SCENES.values():
            total += 1
            try:
                assert_targets(scene, ranges)
            except AssertionError:
                wrong += 1
    yield "targets", "scenes that differ in any cell or pixel", f"{wrong} of {total}"


def losses(dtype: torch.dtype) -> Iterator[Row]:
    """Relative differences of losses; differences of gradients relative to the largest gradient of their tensor."""
    loss_error = gradient_error = 0.0
    for case in BATCHES.values():
        raw, truth = stored_batch(case, dtype)
        found = criterion_of(case)(raw, truth)
        for key, stored in (("loss_mask", case["loss_mask"]), ("loss_category", case["loss_cls"])):
            loss_error = max(loss_error, relative(found[key].item(), stored))
        sum(found.values()).backward()
        pairs = [*zip(raw["category_logits"], case["grad_cls"]), (raw["mask_features"], case["grad_feat"])]
        for tensor, stored in pairs:
            sampled = tensor.grad.double().flatten()[:: stored["stride"]]
            gradient_error = max(gradient_error, scaled(sampled, stored["values"], tensor.grad))
        largest = torch.cat([level.grad.flatten() for level in raw["kernels"]])
        for level, image, cell, *values in case["grad_kernel"]["rows"]:
            row = raw["kernels"][level].grad[image].flatten(1)[:, cell].double()
            gradient_error = max(gradient_error, scaled(row, values, largest))
    yield "losses", "largest relative difference", f"{loss_error:.1e}"
    yield "gradients", "largest difference / largest gradient", f"{gradient_error:.1e}"


def instances(dtype: torch.dtype) -> Iterator[Row]:
    """Post-processing of synthetic raw outputs."""
    pairs = []
    for case in POSTPROCESS_CASES.values():
        pairs += zip(postprocess_case(case, dtype), case["results"])
    yield "post-processing", *compare_instances(pairs)


def decay(dtype: torch.dtype) -> Iterator[Row]:
    """Matrix NMS alone."""
    worst = 0.0
    for name in NMS_SETS:
        for kernel in ("gaussian", "linear"):
            found = matrix_nms(*stored_set(name, dtype), kernel=kernel, sigma=2.0)
            worst = max(worst, (found.double() - stored_decay(name, kernel)).abs().max().item())
    yield "matrix NMS", "largest difference of a score", f"{worst:.1e}"


def trajectories(dtype: torch.dtype, quick: bool) -> Iterator[Row]:
    """Losses and gradient norms of every stored training step."""
    for name, stored in TRAJECTORIES.items():
        if quick and name != "trajectory":
            continue
        model = start_of_trajectory(stored, dtype)
        loss_error = norm_error = 0.0
        for step, (found, norm, _) in zip(stored["steps"], trajectory_steps(model, stored)):
            loss_error = max(loss_error, relative(found["loss_mask"].item(), step["loss_mask"]))
            loss_error = max(loss_error, relative(found["loss_category"].item(), step["loss_cls"]))
            norm_error = max(norm_error, relative(norm.item(), step["grad_norm_before_clip"]))
        yield name, f"losses of {len(stored['steps'])} steps, relative", f"{loss_error:.1e}"
        yield name, "gradient norms, relative", f"{norm_error:.1e}"


def schedules() -> Iterator[Row]:
    """Learning rates."""
    worst = 0.0
    for stored in SCHEDULES.values():
        factor = stored_schedule(stored)
        worst = max(worst, *(relative(stored["base_lr"] * factor(step), rate) for step, rate in stored["lr"]))
    yield "learning rates", "largest relative difference", f"{worst:.1e}"


def compare_instances(pairs: Any) -> tuple[str, str]:
    """(measure, figure): scores by rank, and pixels of masks, each matched among instances of nearly equal score."""
    worst, count, differing, pixels, counts_agree = 0.0, 0, 0, 0, True
    for result, expected in pairs:
        scores = torch.tensor(expected["scores"], dtype=torch.float64)
        counts_agree &= len(scores) == len(result["scores"])
        if not len(scores) or len(scores) != len(result["scores"]):
            continue
        worst = max(worst, (result["scores"].double() - scores).abs().max().item())
        for rank, counts in enumerate(expected["masks"]):
            stored = decode(counts, result["masks"].shape[1:]).bool()
            near = (result["scores"].double() - scores[rank]).abs() <= 3e-4
            near &= result["labels"] == expected["labels"][rank]
            wrong = int((result["masks"][near] ^ stored).flatten(1).sum(1).min()) if near.any() else stored.numel()
            count, differing, pixels = count + 1, differing + (wrong > 0), pixels + wrong
    figure = f"{worst:.1e}; {differing} of {count} masks differ, in {pixels} pixels" + (
        "" if counts_agree else "; COUNTS"
    )
    return "largest difference of a score; masks", figure


def relative(found: float, stored: float) -> float:
    """Difference relative to the stored value, or absolute if that is 0."""
    return abs(found - stored) / (abs(stored) or 1.0)


def scaled(found: Tensor, stored: list[float], whole: Tensor) -> float:
    """Maximum difference relative to the maximum absolute value of the whole tensor."""
    scale = whole.abs().max().item() or 1.0
    return (found - torch.tensor(stored, dtype=torch.float64)).abs().max().item() / scale


if __name__ == "__main__":
    sys.exit(main())
