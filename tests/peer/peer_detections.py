"""The reference's half of detections.py: weights, pixels and detections of mmdetection, written into a folder.

python peer_detections.py PEER_DIR FOLDER     FOLDER/request.json says what is wanted (detections.py writes it)

Runs under the reference's own Python and knows nothing of this library. FOLDER receives

    weights.pth         {"state_dict": ...} under mmdetection's names
    peer.json           versions, and per photograph its sizes (h, w) and counts
    pixels_I.npz        decoded and resized pixels of photograph I, uint8 [h, w, 3] in BGR
    found_I_DTYPE.npz   scores, labels, masks (bits packed along the last axis)
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

# What every residual branch is multiplied by. With 1, fifty layers of random weights amplify every rounding: a change
# of one gray level moves nine of ten masks below IoU 0.9.
BRANCH = 0.1


def main() -> None:
    """Answer the request in the folder."""
    peer_dir, folder = sys.argv[1], Path(sys.argv[2])
    sys.path.insert(0, peer_dir)
    import peer  # only here: the folder is an argument

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    request = json.loads((folder / "request.json").read_text())
    model, cfg = peer.build(request["config"], request["seed"])
    photos = [prepare(path, cfg, request["size"]) for path in request["photos"]]
    for number, photo in enumerate(photos):
        np.savez(folder / f"pixels_{number}.npz", decoded=photo["decoded"], resized=photo["resized"])
    counts = calibrate(peer, model, photos, request)
    torch.save({"state_dict": model.state_dict()}, folder / "weights.pth")
    found = {}
    for dtype in request["dtypes"]:
        model.to(getattr(torch, dtype))
        found[dtype] = [detect(model, photo, folder / f"found_{i}_{dtype}.npz") for i, photo in enumerate(photos)]
    described = [
        {
            "original": list(photo["decoded"].shape[:2]),
            "resized": list(photo["resized"].shape[:2]),
            "candidates": count,
            **{dtype: found[dtype][i] for dtype in request["dtypes"]},
        }
        for i, (photo, count) in enumerate(zip(photos, counts))
    ]
    onednn = re.search(r"(?:oneDNN|MKL-DNN) v([\d.]+)", torch.__config__.show())
    versions = {**peer.versions(), "onednn": onednn[1] if onednn else None}
    (folder / "peer.json").write_text(json.dumps({"versions": versions, "photos": described}))


def prepare(path: str, cfg: Any, size: list[int] | None) -> dict[str, Any]:
    """One photograph through the steps of the test pipeline that concern pixels: pixels between them, and the end."""
    from mmdet.registry import TRANSFORMS

    steps = {step["type"]: dict(step) for step in cfg.test_dataloader.dataset.pipeline}
    if size is not None:
        steps["Resize"]["scale"] = tuple(size)
    sample = {"img_path": path, "img_id": 0}
    sample = TRANSFORMS.build(steps["LoadImageFromFile"])(sample)
    decoded = sample["img"].copy()
    sample = TRANSFORMS.build(steps["Resize"])(sample)
    resized = sample["img"].copy()
    return {"decoded": decoded, "resized": resized, "packed": TRANSFORMS.build(steps["PackDetInputs"])(sample)}


def network_input(model: torch.nn.Module, photo: dict[str, Any]) -> tuple[Tensor, list[Any]]:
    """A photograph alone in its batch, so padded for itself: normalized pixels [1, 3, H, W] and the data sample."""
    packed = photo["packed"]
    batch = model.data_preprocessor({"inputs": [packed["inputs"]], "data_samples": [packed["data_samples"]]}, False)
    return batch["inputs"], batch["data_samples"]


@torch.no_grad()
def calibrate(peer: Any, model: torch.nn.Module, photos: list[dict[str, Any]], request: dict[str, Any]) -> list[int]:
    """Give the network random weights that find something on the photographs.

    `peer.perturb` fits batch norm, kernels and category bias to the first photograph alone; `BRANCH` acts through hooks
    meanwhile and goes into the last batch norm of each block afterwards. The category bias is then moved, all classes
    alike, until the photographs together have `candidates` cells above the category threshold on average.

    Returns:
        The number of candidates on each photograph.
    """
    last = "bn3" if hasattr(model.backbone.layer1[0], "bn3") else "bn2"
    ends = [module for name, module in model.backbone.named_modules() if name.split(".")[-1] == last]
    hooks = [module.register_forward_hook(lambda module, inputs, output: BRANCH * output) for module in ends]
    peer.perturb(model, request["seed"], network_input(model, photos[0])[0], request["candidates"])
    for module, hook in zip(ends, hooks):
        hook.remove()
        module.weight *= BRANCH
        module.bias *= BRANCH
    threshold = model.test_cfg.score_thr
    heights = []  # logits of the cells that points NMS keeps; a shift of the bias does not change which these are
    for photo in photos:
        _, levels, _ = model.mask_head(model.extract_feat(network_input(model, photo)[0]))
        peaks = [x == torch.nn.functional.max_pool2d(x, 2, stride=1, padding=1)[:, :, :-1, :-1] for x in levels]
        heights.append(torch.cat([x[peak] for x, peak in zip(levels, peaks)]))
    # Midway between two logits: a cell exactly at the threshold could be a candidate for one of the two networks only.
    limit = torch.cat(heights).topk(request["candidates"] * len(photos) + 1).values[-2:].mean()
    shift = math.log(threshold / (1 - threshold)) - limit
    model.mask_head.conv_cls.bias += shift
    return [int((x >= limit).sum()) for x in heights]


@torch.no_grad()
def detect(model: torch.nn.Module, photo: dict[str, Any], file: Path) -> dict[str, Any]:
    """Detections of one photograph, written to `file`; returns the padded size and how much the masks cover."""
    inputs, samples = network_input(model, photo)
    found = model.predict(inputs, samples)[0].pred_instances
    masks = found.masks.bool().numpy()
    np.savez(file, scores=found.scores.numpy(), labels=found.labels.numpy(), masks=np.packbits(masks, axis=-1))
    return {"padded": list(inputs.shape[-2:]), "coverage": masks.mean((1, 2)).tolist()}


if __name__ == "__main__":
    main()
