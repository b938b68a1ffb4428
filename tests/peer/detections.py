"""Compare our detections on photographs with those of mmdetection 3.3.0, with the same weights in both.

python tests/peer/detections.py PEER_DIR PEER_PYTHON --images DIR --annotations FILE [--config solov2_light_r50]
                                [--count 12] [--size LONG SHORT] [--json FILE]

PEER_DIR holds the reference's driver peer.py, PEER_PYTHON is the interpreter it is installed for. The reference runs in
a process of its own (peer_detections.py); the two exchange files.

Both read the same files. The decoded and the resized pixels must be equal. In each precision every detection needs a
partner in the other list with the same label, a score within the tolerance and a mask of IoU >= 0.99; the order counts
where scores differ by more than the tolerance. Only a detection whose score lies within the tolerance of the score
threshold, or of the last place that the limit per image leaves, may stay alone. The padded sizes must be equal and
something must be found. The exit status is 0 if this holds for all photographs, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the checkout this file belongs to, installed or not

from solov2.build import build_model  # noqa: E402
from solov2.models.solov2 import SOLOv2  # noqa: E402
from solov2.ops.images import read_image  # noqa: E402
from solov2.ops.resize import resize_image, resized_size  # noqa: E402

TOLERANCES = {"float64": 1e-6, "float32": 3e-4}  # of a score
SAME_MASK = 0.99  # least IoU

Found = dict[str, Tensor]  # scores float [N], labels int64 [N], masks bool [N, H, W]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; 0 if all photographs agree, else 1."""
    parser = _parser()
    args = parser.parse_args(argv)
    needed = (args.peer_dir / "peer.py", args.images, args.annotations)
    missing = next((path for path in needed if not path.exists()), None)
    if missing is not None:
        parser.error(f"{missing} does not exist")
    torch.set_num_threads(1)
    content = json.loads(args.annotations.read_text())
    chosen = sorted(content["images"], key=lambda image: image["id"])[: args.count]
    paths = [args.images.resolve() / image["file_name"] for image in chosen]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peer = run_peer(folder, paths, args)
        report = compare(folder, paths, peer, args)
    print_report(report)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if report["holds"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer_dir", type=Path, metavar="PEER_DIR", help="folder of peer.py")
    parser.add_argument("peer_python", metavar="PEER_PYTHON", help="interpreter with mmdetection")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the photographs")
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE", help="COCO file that lists them")
    parser.add_argument("--config", default="solov2_light_r50", metavar="NAME", help="a name that peer.py knows")
    parser.add_argument("--count", type=int, default=12, metavar="N", help="photographs, the first by id; default 12")
    parser.add_argument("--size", type=int, nargs=2, metavar=("LONG", "SHORT"), help="default: the model's own")
    parser.add_argument("--candidates", type=int, default=90, metavar="N", help="cells above the category threshold")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    return parser


def run_peer(folder: Path, paths: Sequence[Path], args: argparse.Namespace) -> dict[str, Any]:
    """Let the reference fill `folder` (peer_detections.py says with what); returns its peer.json."""
    request = {
        "config": args.config,
        "seed": args.seed,
        "candidates": args.candidates,
        "size": args.size,
        "dtypes": list(TOLERANCES),
        "photos": [str(path) for path in paths],
    }
    (folder / "request.json").write_text(json.dumps(request))
    script = Path(__file__).with_name("peer_detections.py")
    command = [args.peer_python, str(script), str(args.peer_dir.resolve()), str(folder)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads((folder / "peer.json").read_text())


def compare(folder: Path, paths: Sequence[Path], peer: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The comparison of all photographs, as plain values."""
    overrides = {} if args.size is None else {"input_scale": tuple(args.size)}
    name = f"{args.config.removesuffix('_3x')}_fpn_3x"  # the schedule is not part of the network
    model = build_model(name, weights=folder / "weights.pth", **overrides)
    photos = [{"file": path.name, **described} for path, described in zip(paths, peer["photos"])]
    for number, (path, photo) in enumerate(zip(paths, photos)):
        photo["different_pixels"] = different_pixels(model, path, folder / f"pixels_{number}.npz")
    for dtype, tolerance in TOLERANCES.items():
        model.to(getattr(torch, dtype))
        for number, photo in enumerate(photos):
            theirs = read_found(folder / f"found_{number}_{dtype}.npz", photo["original"][1])
            ours, padded = detect(model, paths[number])
            photo[dtype] |= {
                "same_padding": padded == photo[dtype]["padded"],
                **same_detections(ours, theirs, tolerance, model),
            }
            # A list without detections would agree with anything.
            photo[dtype]["holds"] &= photo[dtype]["same_padding"] and photo[dtype]["peer"] > 0
    return {
        "config": args.config,
        "model": name,
        "input_scale": list(model.input_scale),
        "seed": args.seed,
        "versions": {"ours": own_versions(), "peer": peer["versions"]},
        "holds": all(
            photo[dtype]["holds"] and not any(photo["different_pixels"].values())
            for photo in photos
            for dtype in TOLERANCES
        ),
        "photos": photos,
    }


def own_versions() -> dict[str, Any]:
    """What could make a float32 run differ."""
    onednn = re.search(r"(?:oneDNN|MKL-DNN) v([\d.]+)", torch.__config__.show())
    return {
        "torch": str(torch.__version__),
        "onednn": onednn[1] if onednn else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def read_found(file: Path, width: int) -> Found:
    """Detections of the reference."""
    with np.load(file) as arrays:
        masks = np.unpackbits(arrays["masks"], axis=-1, count=width).astype(bool)
        return {
            "masks": torch.from_numpy(masks),
            **{key: torch.from_numpy(arrays[key]) for key in ("scores", "labels")},
        }


def different_pixels(model: SOLOv2, path: Path, file: Path) -> dict[str, int]:
    """Number of values that differ from the reference's after decoding and after resizing; -1 if the sizes differ."""
    decoded = read_image(path, apply_exif=True)
    long, short = model.input_scale
    own = {
        "decoded": decoded,
        "resized": resize_image(decoded, resized_size(tuple(decoded.shape[1:]), long=long, short=short)),
    }
    differences = {}
    with np.load(file) as arrays:
        for step, image in own.items():
            theirs = torch.from_numpy(arrays[step][:, :, ::-1].copy()).permute(2, 0, 1)  # from BGR
            differences[step] = int((image != theirs).sum()) if image.shape == theirs.shape else -1
    return differences


@torch.no_grad()
def detect(model: SOLOv2, path: Path) -> tuple[Found, list[int]]:
    """Our detections from a file, and the padded size."""
    inputs, sizes, original_sizes = model.preprocess([path])
    return model.postprocess(model(inputs), sizes, original_sizes)[0], list(inputs.shape[-2:])


def mask_ious(first: Tensor, second: Tensor) -> Tensor:
    """Bool [N, H, W] and [M, H, W] -> IoU float64 [N, M]; 1 for two empty masks."""
    first, second = first.flatten(1).float(), second.flatten(1).float()  # sums below 2^24 are exact in float32
    common = (first @ second.T).double()
    union = first.sum(1).double()[:, None] + second.sum(1).double() - common
    return torch.where(union > 0, common / union.clamp(min=1), 1.0)


def pair_up(values: Tensor, allowed: Tensor) -> list[tuple[int, int]]:
    """One-to-one pairs of rows and columns among `allowed`, greedily from the largest value down."""
    values = torch.where(allowed, values, -torch.inf)
    pairs = []
    while values.numel() and values.max() > -torch.inf:
        row, column = divmod(int(values.argmax()), values.shape[1])
        pairs.append((row, column))
        values[row], values[:, column] = -torch.inf, -torch.inf
    return pairs


def cuts(found: Found, model: SOLOv2) -> list[float]:
    """Scores at which an image's list ends: the threshold, and the last score where the list is full."""
    full = len(found["scores"]) == model.settings.max_instances
    return [model.settings.score_threshold] + ([found["scores"][-1].item()] if full else [])


def same_detections(ours: Found, theirs: Found, tolerance: float, model: SOLOv2) -> dict[str, Any]:
    """The comparison of one photograph in one precision."""
    ious = mask_ious(ours["masks"], theirs["masks"])
    same_label = ours["labels"][:, None] == theirs["labels"]
    differences = (ours["scores"].double()[:, None] - theirs["scores"].double()).abs()
    # The closest mask decides; among equal ones (duplicates that Matrix NMS left) the closest score.
    pairs = pair_up(ious - 1e-9 * differences / tolerance, same_label & (differences <= tolerance))
    good = sorted((i, j) for i, j in pairs if ious[i, j] >= SAME_MASK)
    alone = {"ours": set(range(len(ious))) - {i for i, _ in good}, "peer": set(range(ious.shape[1]))}
    alone["peer"] -= {j for _, j in good}
    cut, unmatched = [], []
    limits = cuts(ours, model) + cuts(theirs, model)
    for side, found in (("ours", ours), ("peer", theirs)):
        for i in sorted(alone[side]):
            score, row = found["scores"][i].item(), ious[i] if side == "ours" else ious[:, i]
            labels = same_label[i] if side == "ours" else same_label[:, i]
            best = row[labels].max().item() if labels.any() else 0.0
            entry = {"side": side, "rank": i, "label": found["labels"][i].item(), "score": score, "best_iou": best}
            (cut if min(abs(score - limit) for limit in limits) <= tolerance else unmatched).append(entry)
    ranks = torch.tensor([j for _, j in good])
    scores = ours["scores"][[i for i, _ in good]]
    swapped = (ranks[:, None] > ranks) & (scores[:, None] - scores > tolerance)
    common = min(ious.shape)
    return {
        "ours": ious.shape[0],
        "peer": ious.shape[1],
        "matched": len(good),
        "labels_equal_by_rank": int((ours["labels"][:common] == theirs["labels"][:common]).sum()),
        "near_cut": cut,
        "unmatched": unmatched,
        "swapped": int(swapped.sum()),
        "score_difference": max((differences[pair].item() for pair in good), default=0.0),
        "least_iou": min((ious[pair].item() for pair in good), default=1.0),
        "equal_masks": sum(bool((ours["masks"][i] == theirs["masks"][j]).all()) for i, j in good),
        "last_scores": [found["scores"][-1].item() if len(found["scores"]) else None for found in (ours, theirs)],
        "holds": not unmatched and not swapped.any().item(),
    }


def print_report(report: dict[str, Any]) -> None:
    """One table for each precision, with one line per photograph and the sums."""
    photos = report["photos"]
    print(f"{report['config']} at {report['input_scale']}, {len(photos)} photographs")
    for side, versions in report["versions"].items():
        print(f"  {side}: " + ", ".join(f"{key} {value}" for key, value in versions.items()))
    coverage = torch.tensor([share for photo in photos for share in photo["float32"]["coverage"]])
    if len(coverage):
        low, middle, high = torch.quantile(coverage, torch.tensor([0.05, 0.5, 0.95])).tolist()
        print(f"  masks cover {low:.3f} / {middle:.3f} / {high:.3f} of the photograph (5 %, median, 95 %)")
    for step in ("decoded", "resized"):
        print(f"  different values {step}: {[photo['different_pixels'][step] for photo in photos]}")
    for dtype, tolerance in TOLERANCES.items():
        print(f"\n{dtype}: scores within {tolerance:g}, IoU >= {SAME_MASK}")
        print_detections(photos, dtype)
    print("every photograph agrees" if report["holds"] else "NOT every photograph agrees")


def print_detections(photos: Sequence[dict[str, Any]], dtype: str) -> None:
    """labels: equal at the same rank; cut, alone: without partner near a cut, elsewhere; !: padded differently."""
    print("photo              padded     ours  peer matched  labels  cut  alone swap   max|ds|   min IoU  =masks")
    rows = [
        {**photo[dtype], "cut": len(photo[dtype]["near_cut"]), "alone": len(photo[dtype]["unmatched"])}
        for photo in photos
    ]
    counted = ("ours", "peer", "matched", "labels_equal_by_rank", "cut", "alone", "swapped", "equal_masks")
    total = {key: sum(row[key] for row in rows) for key in counted}
    total["score_difference"] = max(row["score_difference"] for row in rows)
    total["least_iou"] = min(row["least_iou"] for row in rows)
    padded = ["x".join(map(str, row["padded"])) + ("" if row["same_padding"] else "!") for row in rows]
    for name, size, row in zip([*(photo["file"] for photo in photos), "all"], [*padded, ""], [*rows, total]):
        print(
            f"{name:18s} {size:10s} {row['ours']:4d}  {row['peer']:4d} {row['matched']:7d} "
            f"{row['labels_equal_by_rank']:7d} {row['cut']:4d} {row['alone']:6d} {row['swapped']:4d}   "
            f"{row['score_difference']:.1e}  {row['least_iou']:.6f} {row['equal_masks']:7d}"
        )


if __name__ == "__main__":
    sys.exit(main())
