"""Shared by the parity tests: the reference's numbers, and the rules that generate its weights and inputs.

The reference is mmdetection 3.3.0 on a CPU. `tests/data/README.md` lists the numbers that are kept. Weights and inputs
are not stored: every array is drawn from a generator seeded with the array's name.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import torch
from torch import Tensor

from solov2.build import build_model
from solov2.config import load_config
from solov2.convert import convert_state_dict
from solov2.losses import SOLOv2Criterion
from solov2.models.postprocess import postprocess
from solov2.models.solov2 import SOLOv2
from solov2.settings import PostprocessSettings
from solov2.targets import TargetAssigner

DATA = Path(__file__).resolve().parents[1] / "data"
SEED = 20261122
CPU = torch.device("cpu")
GRIDS = (40, 36, 24, 16, 12)

# the reference's name of a configuration -> ours
MODELS = {
    "solov2_r50": "solov2_r50_fpn_3x",
    "solov2_r101_dcn": "solov2_r101_dcn_fpn_3x",
    "solov2_x101_dcn": "solov2_x101_dcn_fpn_3x",
    "solov2_light_r18": "solov2_light_r18_fpn_3x",
    "solov2_light_r34": "solov2_light_r34_fpn_3x",
    "solov2_light_r50": "solov2_light_r50_fpn_3x",
    "solov2_light_r50_dcn": "solov2_light_r50_dcn_fpn_3x",
}

# our state-dict names -> mmdetection's; solov2.convert does the reverse
TO_MMDET = (
    (r"^fpn\.lateral\.(\d)\.", r"neck.lateral_convs.\1.conv."),
    (r"^fpn\.output\.(\d)\.", r"neck.fpn_convs.\1.conv."),
    (r"^head\.category_tower\.", "mask_head.cls_convs."),
    (r"^head\.kernel_tower\.", "mask_head.kernel_convs."),
    (r"^head\.category_predictor\.", "mask_head.conv_cls."),
    (r"^head\.kernel_predictor\.", "mask_head.conv_kernel."),
    (r"^mask_feature_head\.levels\.(\d)\.(\d)\.", r"mask_head.mask_feature_head.convs_all_levels.\1.conv\2."),
    (r"^mask_feature_head\.predictor\.", "mask_head.mask_feature_head.conv_pred."),
    (r"^semantic_head\.levels\.(\d)\.(\d)\.", r"semantic_head.conv_upsample_layers.\1.conv.\2."),
    (r"^semantic_head\.predictor\.", "semantic_head.conv_logits."),
    (r"\.norm\.", ".gn."),
)


def load(name: str) -> Any:
    """Load a JSON file of tests/data, or the arrays of an archive by name."""
    path = DATA / name
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return dict(arrays)
    return json.loads(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_text())


# Read at import, which takes a few hundredths of a second; never modified.
FORWARD = load("forward.json.gz")  # the reference's name of a configuration -> input, weights, outputs, instances
BATCHES = {case["name"]: case for case in load("losses.json.gz")["cases"]}
POSTPROCESS_CASES = {case["name"]: case for case in load("postprocess.json.gz")["cases"]}
NMS_ARRAYS = load("matrix_nms.npz")  # "set.field" -> array
NMS_SETS = sorted({name.split(".")[0] for name in NMS_ARRAYS})


# ---- weights


def draw(tag: str, shape: Sequence[int], seed: int = SEED) -> np.ndarray:
    """Standard normal values determined by a name, float64."""
    return np.random.RandomState(zlib.crc32(f"{tag}#{seed}".encode())).standard_normal(tuple(shape))


def mmdet_name(name: str) -> str:
    """mmdetection's name of one of our state-dict entries."""
    for pattern, replacement in TO_MMDET:
        name = re.sub(pattern, replacement, name)
    return name


def mmdet_shapes(model: SOLOv2) -> dict[str, tuple[int, ...]]:
    """mmdetection's state dict for this network: name -> shape."""
    return {mmdet_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def mmdet_weights(
    shapes: Mapping[str, tuple[int, ...]], overrides: Mapping[str, Any], seed: int = SEED
) -> dict[str, Tensor]:
    """Weights under mmdetection's names, drawn in float64 and rounded to float32 once.

    Convolutions have variance gain / fan-in, norm weights lie around 1 (0.5 at the end of a residual block), the rest
    is small. `overrides` rescales some tensors so that activations stay of the order of 1.
    """
    state = {}
    for name, shape in shapes.items():
        layer, kind = name.rsplit(".", 1)
        if kind == "num_batches_tracked":
            state[name] = torch.zeros(shape, dtype=torch.int64)
            continue
        value = draw(name, shape, seed)
        if len(shape) == 4:
            value = value * math.sqrt(_gain(layer) / math.prod(shape[1:]))
        elif kind == "running_var":
            value = np.exp(0.1 * value) * overrides.get("running_var_scale", {}).get(layer, 1.0)
        elif kind == "weight":
            value = (1 + 0.1 * np.clip(value, -2, 2)) * (0.5 if _ends_block(layer, shapes) else 1.0)
        else:
            value = 0.05 * value
        value = value * overrides.get("weight_scale", {}).get(name, 1.0)
        value = np.asarray(overrides.get("replace", {}).get(name, value), dtype=np.float64)
        state[name] = torch.from_numpy(value.reshape(shape).astype(np.float32))
    return state


def _gain(layer: str) -> float:
    if layer.endswith("conv_offset"):
        return 0.25
    return 1.0 if layer.startswith("neck.") or layer.endswith(("conv_cls", "conv_kernel")) else 2.0


def _ends_block(layer: str, names: Iterable[str]) -> bool:
    """Whether this is the last norm of a residual block: bn3, or bn2 in a basic block."""
    block, _, norm = layer.rpartition(".")
    last = "bn3" if f"{block}.bn3.weight" in names else "bn2"
    return block.startswith("backbone.layer") and norm == last


def reference_model(config: str, overrides: Mapping[str, Any]) -> SOLOv2:
    """Our model with the reference's weights, float32, in evaluation mode; loaded through the converter.

    It is built on the meta device, because initializing weights that are then replaced takes seconds.
    """
    with torch.device("meta"):
        model = build_model(MODELS[config], device="meta")
    state, traits = convert_state_dict(mmdet_weights(mmdet_shapes(model), overrides))
    assert traits["family"] == "mmdet"
    model.load_state_dict(state, assign=True)
    settings = load_config(MODELS[config]).model
    model.pixel_mean, model.pixel_std = (  # not in the state dict, so still on the meta device
        torch.tensor(values).view(1, 3, 1, 1) for values in (settings.pixel_mean, settings.pixel_std)
    )
    return model


# ---- inputs


def network_input(tag: str, shape: Sequence[int], valid: Sequence[Sequence[int]] = (), seed: int = SEED) -> Tensor:
    """Normalized images, float32 [B, 3, H, W], zero outside `valid` (h, w of each image)."""
    images = torch.from_numpy(draw(f"input/{tag}", shape, seed).astype(np.float32))
    for image, (height, width) in zip(images, valid):
        image[:, height:] = 0
        image[:, :, width:] = 0
    return images


def raw_outputs(tag: str, params: Mapping[str, Any], dtype: torch.dtype, device: torch.device = CPU) -> dict[str, Any]:
    """A synthetic raw dict: noise of given scales, smooth mask features, and edits of single cells."""
    batch, channels, (height, width) = params["batch"], params["kernel_channels"], params["feat"]
    logits, kernels = [], []
    for level, size in enumerate(GRIDS):
        noise = draw(f"{tag}/cls{level}", (batch, params["num_classes"], size, size))
        logits.append((noise * params["cls_scale"] + params["cls_shift"]).astype(np.float32))
        kernel = draw(f"{tag}/kernel{level}", (batch, channels, size, size)) * params["kernel_scale"]
        kernel[:, 0] += params.get("kernel0_shift", 0.0)
        kernels.append(kernel.astype(np.float32))
    features = draw(f"{tag}/feat", (batch, channels, height, width)) * params["feat_noise"]
    if params.get("feat_basis"):
        features = features + params["feat_basis"] * _cosines(channels, height, width)
    for edit in params.get("edits", ()):
        _edit(logits, kernels, *edit)
    return {
        "category_logits": [torch.from_numpy(level).to(device, dtype) for level in logits],
        "kernels": [torch.from_numpy(level).to(device, dtype) for level in kernels],
        "mask_features": torch.from_numpy(features.astype(np.float32)).to(device, dtype),
    }


def _cosines(channels: int, height: int, width: int) -> np.ndarray:
    """A cosine basis [channels, height, width], as in image compression."""
    side = math.ceil(math.sqrt(channels))
    y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    return np.stack(
        [np.outer(np.cos(math.pi * (c // side) * y), np.cos(math.pi * (c % side) * x)) for c in range(channels)]
    )


def _edit(logits: list[np.ndarray], kernels: list[np.ndarray], kind: str, *values: Any) -> None:
    if kind == "cls":
        level, image, label, y, x, value = values
        logits[level][image, label, y, x] = value
    elif kind == "kernel0":
        level, image, y, x, value = values
        kernels[level][image, 0, y, x] = value
    elif kind == "zero_kernel":
        level, image, y, x = values
        kernels[level][image, :, y, x] = 0
    else:
        assert kind == "copy_kernel", kind
        image, (level, y, x), (other, other_y, other_x) = values
        kernels[other][image, :, other_y, other_x] = kernels[level][image, :, y, x]


def decode(counts: str, size: Sequence[int]) -> Tensor:
    """A stored mask, uint8 [h, w]."""
    return torch.from_numpy(coco_mask.decode({"size": list(size), "counts": counts.encode()}))


def instances(image: Mapping[str, Any]) -> dict[str, Tensor]:
    """Ground truth of one stored image, as `TargetAssigner` takes it."""
    masks = [decode(counts, image["img_shape"]) for counts in image["masks"]]
    return {
        "boxes": torch.tensor(image["boxes"], dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(image["labels"], dtype=torch.int64),
        "masks": torch.stack(masks) if masks else torch.zeros(0, *image["img_shape"], dtype=torch.uint8),
    }


def raw_tensors(raw: Mapping[str, Any]) -> list[Tensor]:
    """The eleven tensors of a raw dict: category logits and kernels of five levels, mask features."""
    return [*raw["category_logits"], *raw["kernels"], raw["mask_features"]]


# ---- what is compared


def run_network(model: SOLOv2, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One forward pass: (every stored output by name, the raw dict)."""
    outputs: dict[str, Tensor] = {}

    def keep(letter: str, levels: Sequence[Tensor]) -> None:
        outputs.update({f"{letter}{i}": level for i, level in enumerate(levels, 2)})

    hooks = [
        model.backbone.register_forward_hook(lambda module, inputs, result: keep("C", result)),
        model.fpn.register_forward_hook(lambda module, inputs, result: keep("P", result)),
    ]
    with torch.no_grad():
        raw = model(images)
    for hook in hooks:
        hook.remove()
    outputs.update({f"cls{i}": level for i, level in enumerate(raw["category_logits"])})
    outputs.update({f"kernel{i}": level for i, level in enumerate(raw["kernels"])})
    return outputs | {"mask_feats": raw["mask_features"]}, raw


def sampled_outputs(config: str) -> dict[str, Tensor]:
    """Stored values of every output of a network, float64; `FORWARD` has their strides."""
    stored = FORWARD[config]["outputs"]
    values = torch.from_numpy(load("forward.npz")[config])
    return dict(zip(stored, values.split([entry["count"] for entry in stored.values()]), strict=True))


def criterion_of(case: Mapping[str, Any]) -> SOLOv2Criterion:
    """The criterion for a stored batch."""
    return SOLOv2Criterion(num_classes=case["params"]["num_classes"])


def stored_batch(
    case: Mapping[str, Any], dtype: torch.dtype, device: torch.device = CPU
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(raw outputs that require gradients, targets) of a stored batch."""
    raw = raw_outputs(case["tag"], case["params"], dtype, device)
    for tensor in raw_tensors(raw):
        tensor.requires_grad_()
    assign = TargetAssigner(GRIDS, case["scale_ranges"], num_classes=case["params"]["num_classes"])
    targets = assign([instances(image) for image in case["images"]], tuple(case["pad_shape"]))
    return raw, {key: value.to(device) if isinstance(value, Tensor) else value for key, value in targets.items()}


def postprocess_settings(case: Mapping[str, Any]) -> PostprocessSettings:
    """The settings of a stored case under our names; "no limit" is -1 there and 0 here."""
    stored = case["test_cfg"]
    return PostprocessSettings(
        category_threshold=stored["score_thr"],
        mask_threshold=stored["mask_thr"],
        max_candidates=max(0, stored["nms_pre"]),
        nms_kernel=stored["kernel"],
        nms_sigma=stored["sigma"],
        score_threshold=max(0, stored["filter_thr"]),
        max_instances=max(0, stored["max_per_img"]),
    )


def postprocess_case(
    case: Mapping[str, Any], dtype: torch.dtype = torch.float32, device: torch.device = CPU, **options: Any
) -> list[dict[str, Any]]:
    """Results of the images of a stored case; `options` are those of `postprocess`."""
    return postprocess(
        raw_outputs(case["tag"], case["params"], dtype, device),
        [meta["img_shape"] for meta in case["metas"]],
        [meta["ori_shape"] for meta in case["metas"]],
        postprocess_settings(case),
        **options,
    )


def stored_set(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(masks, labels, scores) of a stored set, as Matrix NMS takes them."""
    count, height, width = NMS_ARRAYS[f"{name}.shape"]
    bits = np.unpackbits(NMS_ARRAYS[f"{name}.masks"], axis=1, count=height * width).reshape(count, height, width)
    return (
        torch.from_numpy(bits).bool(),
        torch.from_numpy(NMS_ARRAYS[f"{name}.labels"]),
        torch.from_numpy(NMS_ARRAYS[f"{name}.scores"]).to(dtype),
    )


def stored_decay(name: str, kernel: str) -> Tensor:
    """Decayed scores of a stored set, float64."""
    return torch.from_numpy(NMS_ARRAYS[f"{name}.{kernel}"])


# ---- comparison


def assert_outputs(config: str, outputs: Mapping[str, Tensor], tolerance: float) -> None:
    """Compare sampled values relative to their tensor's standard deviation; for all images, also mean and deviation."""
    stored, values = FORWARD[config]["outputs"], sampled_outputs(config)
    assert outputs.keys() == stored.keys()
    for name, entry in stored.items():
        actual, std = outputs[name].double(), entry["std"]
        assert list(actual.shape[1:]) == entry["shape"][1:]
        sampled = actual.flatten()[:: entry["stride"]]
        assert (sampled - values[name][: len(sampled)]).abs().max() <= tolerance * std, name
        if len(actual) == entry["shape"][0]:
            assert abs(actual.mean().item() - entry["mean"]) <= tolerance * std, name
            assert abs(actual.std(correction=0).item() - std) <= tolerance * std, name


def assert_same_instances(
    result: Mapping[str, Any], expected: Mapping[str, Any], *, score_tolerance: float, pixels: int = 0
) -> None:
    """Compare a result with a stored one.

    Scores are compared rank by rank. Instances whose scores are within the tolerance may come in any order; otherwise
    labels and boxes must be equal, and masks may differ in at most `pixels` pixels.
    """
    scores = torch.tensor(expected["scores"], dtype=torch.float64)
    assert len(result["scores"]) == len(scores) == len(expected["labels"])
    if not len(scores):
        return
    assert (result["scores"].double() - scores).abs().max() <= score_tolerance
    areas = result["masks"].flatten(1).sum(1).tolist()
    found = list(zip(result["labels"].tolist(), areas, result["boxes"].tolist(), result["masks"]))
    start = 0
    for end in range(1, len(scores) + 1):
        if end < len(scores) and scores[end - 1] - scores[end] <= 2 * score_tolerance:
            continue  # still the same tie
        rest = found[start:end]
        for rank in range(start, end):
            rest.remove(next((item for item in rest if _fits(item, expected, rank, pixels)), None))
        start = end


def _fits(item: tuple[int, int, list[float], Tensor], expected: Mapping[str, Any], rank: int, pixels: int) -> bool:
    label, area, box, mask = item
    if label != expected["labels"][rank] or abs(area - expected["areas"][rank]) > pixels:
        return False
    if max(abs(a - b) for a, b in zip(box, expected["boxes"][rank])) > min(pixels, 1):
        return False
    if rank >= len(expected["masks"]):
        return True
    return int((mask ^ decode(expected["masks"][rank], mask.shape).bool()).sum()) <= pixels


# ---- names of the other families

# mmdetection's names -> WXinlong/SOLO's
TO_ORIGINAL = (
    (r"^mask_head\.cls_convs\.", "bbox_head.cate_convs."),
    (r"^mask_head\.kernel_convs\.", "bbox_head.kernel_convs."),
    (r"^mask_head\.conv_cls\.", "bbox_head.solo_cate."),
    (r"^mask_head\.conv_kernel\.", "bbox_head.solo_kernel."),
    (r"^mask_head\.mask_feature_head\.conv_pred\.", "mask_feat_head.conv_pred.0."),
    (r"^mask_head\.mask_feature_head\.", "mask_feat_head."),
)


def original_name(name: str) -> str:
    """The authors' name of one of mmdetection's state-dict entries."""
    for pattern, replacement in TO_ORIGINAL:
        name = re.sub(pattern, replacement, name)
    return name


def adelaidet_name(name: str) -> str:
    """AdelaiDet's name of one of mmdetection's state-dict entries (it has none for num_batches_tracked)."""
    name = re.sub(r"^backbone\.(conv1|bn1)\.", r"backbone.bottom_up.stem.\1.", name)
    name = re.sub(r"^backbone\.layer(\d)\.", lambda m: f"backbone.bottom_up.res{int(m[1]) + 1}.", name)
    name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    name = re.sub(r"^(backbone\.bottom_up\..*)\.bn(\d)\.", r"\1.conv\2.norm.", name)
    name = re.sub(r"^neck\.lateral_convs\.(\d)\.conv\.", lambda m: f"backbone.fpn_lateral{int(m[1]) + 2}.", name)
    name = re.sub(r"^neck\.fpn_convs\.(\d)\.conv\.", lambda m: f"backbone.fpn_output{int(m[1]) + 2}.", name)
    for theirs, mmdet in (("cate_tower", "cls_convs"), ("kernel_tower", "kernel_convs")):
        name = re.sub(
            rf"^mask_head\.{mmdet}\.(\d)\.(conv|gn)\.",
            lambda m, tower=theirs: f"ins_head.{tower}.{3 * int(m[1]) + (m[2] == 'gn')}.",
            name,
        )
    name = name.replace("mask_head.conv_cls.", "ins_head.cate_pred.")
    name = name.replace("mask_head.conv_kernel.", "ins_head.kernel_pred.")
    if name.startswith("mask_head.mask_feature_head."):
        name = name.replace("mask_head.mask_feature_head.", "mask_head.")
        name = re.sub(r"\.conv\.(?=weight$)", ".0.", name)
        name = name.replace(".gn.", ".1.")
    return name
