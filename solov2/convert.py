"""Convert the checkpoints of other SOLOv2 implementations with tables of names.

Each family has a table of prefixes, theirs -> ours. A name that matches no entry is an error; nothing is dropped. What
else differs between families (pixel statistics, stride position, DCN version) is returned as `traits`, which
`solov2.build_model` reads before it constructs the network.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from solov2.errors import printable

RGB_MEAN, RGB_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

# Pixel statistics that a file may hold among its tensors (detectron2; mmdetection's data_preprocessor).
STATISTICS = {
    "pixel_mean": "pixel_mean",
    "pixel_std": "pixel_std",
    "data_preprocessor.mean": "pixel_mean",
    "data_preprocessor.std": "pixel_std",
}


def _mmdet_prefixes() -> Iterator[tuple[str, str]]:
    """mmdetection 2.25 and later, including 3.x."""
    yield "backbone", "backbone"
    for i in range(4):
        yield f"neck.lateral_convs.{i}.conv", f"fpn.lateral.{i}"
        yield f"neck.fpn_convs.{i}.conv", f"fpn.output.{i}"
        yield from _conv_norm(f"mask_head.cls_convs.{i}", f"head.category_tower.{i}")
        yield from _conv_norm(f"mask_head.kernel_convs.{i}", f"head.kernel_tower.{i}")
    yield "mask_head.conv_cls", "head.category_predictor"
    yield "mask_head.conv_kernel", "head.kernel_predictor"
    theirs, ours = "mask_head.mask_feature_head.convs_all_levels", "mask_feature_head.levels"
    for i, j in _mask_branch_steps():
        yield from _conv_norm(f"{theirs}.{i}.conv{j}", f"{ours}.{i}.{j}")
    yield from _conv_norm("mask_head.mask_feature_head.conv_pred", "mask_feature_head.predictor")
    for i, j in _mask_branch_steps():  # of its Panoptic FPN
        yield from _conv_norm(f"semantic_head.conv_upsample_layers.{i}.conv.{j}", f"semantic_head.levels.{i}.{j}")
    yield "semantic_head.conv_logits", "semantic_head.predictor"


def _original_prefixes() -> Iterator[tuple[str, str]]:
    """WXinlong/SOLO: mmdetection's structure with the names of the authors' fork."""
    renamed = {
        "mask_head.cls_convs": "bbox_head.cate_convs",
        "mask_head.kernel_convs": "bbox_head.kernel_convs",
        "mask_head.conv_cls": "bbox_head.solo_cate",
        "mask_head.conv_kernel": "bbox_head.solo_kernel",
        "mask_head.mask_feature_head.convs_all_levels": "mask_feat_head.convs_all_levels",
        "mask_head.mask_feature_head.conv_pred": "mask_feat_head.conv_pred.0",
    }
    for theirs, ours in _mmdet_prefixes():
        start = next((name for name in renamed if theirs.startswith(name)), "")
        yield renamed.get(start, "") + theirs.removeprefix(start), ours


def _adelaidet_prefixes() -> Iterator[tuple[str, str]]:
    """AdelaiDet on detectron2."""
    theirs, ours = "backbone.bottom_up", "backbone"
    yield f"{theirs}.stem.conv1", f"{ours}.conv1"
    yield f"{theirs}.stem.conv1.norm", f"{ours}.bn1"
    for i in range(1, 5):
        for j in range(23):  # blocks of the deepest stage, layer3 of ResNet-101
            block = f"{theirs}.res{i + 1}.{j}"
            for k in (1, 2, 3):
                yield f"{block}.conv{k}", f"{ours}.layer{i}.{j}.conv{k}"
                yield f"{block}.conv{k}.norm", f"{ours}.layer{i}.{j}.bn{k}"
            yield f"{block}.shortcut", f"{ours}.layer{i}.{j}.downsample.0"
            yield f"{block}.shortcut.norm", f"{ours}.layer{i}.{j}.downsample.1"
    for i in range(4):
        yield f"backbone.fpn_lateral{i + 2}", f"fpn.lateral.{i}"
        yield f"backbone.fpn_output{i + 2}", f"fpn.output.{i}"
        for theirs, ours in (("cate_tower", "category_tower"), ("kernel_tower", "kernel_tower")):
            yield f"ins_head.{theirs}.{3 * i}", f"head.{ours}.{i}.conv"  # a flat list of convolution, norm, ReLU
            yield f"ins_head.{theirs}.{3 * i + 1}", f"head.{ours}.{i}.norm"
    yield "ins_head.cate_pred", "head.category_predictor"
    yield "ins_head.kernel_pred", "head.kernel_predictor"
    steps = [(f"convs_all_levels.{i}.conv{j}", f"levels.{i}.{j}") for i, j in _mask_branch_steps()]
    for theirs, ours in [*steps, ("conv_pred", "predictor")]:
        yield f"mask_head.{theirs}.0", f"mask_feature_head.{ours}.conv"
        yield f"mask_head.{theirs}.1", f"mask_feature_head.{ours}.norm"


def _conv_norm(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    yield f"{theirs}.conv", f"{ours}.conv"
    yield f"{theirs}.gn", f"{ours}.norm"


def _mask_branch_steps() -> list[tuple[int, int]]:
    return [(i, j) for i in range(4) for j in range(max(1, i))]


PREFIXES = {
    "mmdet": dict(_mmdet_prefixes()),
    "original": dict(_original_prefixes()),
    "adelaidet": dict(_adelaidet_prefixes()),
}
MARKERS = {  # a tensor that is in every file of the family and in no other file
    "solov2": "head.category_predictor.bias",
    "mmdet": "mask_head.conv_cls.bias",
    "original": "bbox_head.solo_cate.bias",
    "adelaidet": "ins_head.cate_pred.bias",
}


def convert_state_dict(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Rename the state dict of another SOLOv2 implementation to our names. The tensors are not copied.

    Args:
        state_dict: name -> tensor, without wrappers (see `unwrap`).

    Returns:
        (state dict, traits). The traits are family ("solov2", "original", "mmdet" or "adelaidet"); stride_in_1x1 (True
        for detectron2's MSRA backbone, which strides in the first 1x1 convolution of a bottleneck); channel_order
        ("rgb" or "bgr"); pixel_mean and pixel_std (3 floats each, in channel order, in gray levels 0..255); and
        modulated (False for DCNv1, True for DCNv2 and for networks without deformable convolutions).
        Tensors of family "solov2" reveal only the last of these; the others are then defaults, and its files store the
        true values.

    Raises:
        ValueError: the family is not recognized, some names are unknown (the message lists them), or the pixel
            statistics are not those of 3 channels.
    """
    family = next((family for family, marker in MARKERS.items() if marker in state_dict), None)
    if family is None:
        raise ValueError(
            "the tensor names match no SOLOv2 that this version converts (WXinlong/SOLO, mmdetection, AdelaiDet, or "
            f"our own); the first names are: {_first(state_dict, 3) or 'none'}"
        )
    detectron2 = family == "adelaidet"
    traits = {
        "family": family,
        "stride_in_1x1": detectron2,
        "channel_order": "bgr" if detectron2 else "rgb",
        "pixel_mean": list(RGB_MEAN[::-1] if detectron2 else RGB_MEAN),
        "pixel_std": [1.0, 1.0, 1.0] if detectron2 else list(RGB_STD),
    }
    tensors = dict(state_dict)
    for name in STATISTICS.keys() & tensors.keys():
        values = tensors.pop(name).flatten()
        if len(values) != 3:
            raise ValueError(f"{name} has {len(values):,} numbers, not one for each of 3 channels")
        traits[STATISTICS[name]] = values.tolist()
    if family != "solov2":
        tensors = _rename(_drop_ema_copies(tensors), PREFIXES[family])
    return tensors, traits | {"modulated": is_modulated(tensors)}


def to_mmdet(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict from our names to mmdetection's. The tensors are not copied.

    Raises:
        ValueError: mmdetection's SOLOv2 has no counterpart of a tensor.
    """
    if "head.category_tower.0.norm.running_mean" in state_dict:
        raise ValueError("the head has batch norm, but the head of mmdetection's SOLOv2 has group norm")
    return _rename(state_dict, {ours: theirs for theirs, ours in PREFIXES["mmdet"].items()})


def unwrap(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name, without wrappers.

    Uses the entry "state_dict" or "model" if there is one, and strips the prefix "module." (DataParallel) or "model."
    from the names. mmcv and mmengine store averaged weights (EMA) under the plain names, so those are used.
    """
    for wrapper in ("state_dict", "model"):
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    for prefix in ("module.", "model."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def class_names_of(content: Mapping[str, Any]) -> list[str] | None:
    """Class names from mmdetection's meta entry (2.x: CLASSES; 3.x: dataset_meta); None if there are none."""
    meta = content.get("meta")
    places = [meta, meta.get("dataset_meta")] if isinstance(meta, Mapping) else []
    for place in places:
        for key in ("CLASSES", "classes"):
            names = place.get(key) if isinstance(place, Mapping) else None
            if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
                return list(names)
    return None


def _drop_ema_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the second copies that mmcv's EMA stores: `ema_backbone_conv1_weight` next to `backbone.conv1.weight`."""
    copies = {"ema_" + name.replace(".", "_") for name in tensors}
    return {name: tensor for name, tensor in tensors.items() if name not in copies}


def _current_name(name: str) -> str:
    """The current name of an offset branch: mmdetection 1.x wrote `conv2_offset` for `conv2.conv_offset`."""
    name = re.sub(r"(convs_all_levels\.\d\.conv\d)\.conv_offset\.", r"\1.conv.conv_offset.", name)
    return re.sub(r"(?<!\.conv)(?<!\.conv\d)\.(conv\d?)_offset\.", r".\1.conv_offset.", name)


def _rename(tensors: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """Replace the longest known prefix (of whole dotted parts) of each name.

    Raises:
        ValueError: names without a known prefix.
    """
    renamed, unknown = {}, []
    for name, tensor in tensors.items():
        parts = _current_name(name).split(".")
        for end in range(len(parts) - 1, 0, -1):
            prefix = ".".join(parts[:end])
            if prefix in prefixes:
                renamed[".".join([prefixes[prefix], *parts[end:]])] = tensor
                break
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"{len(unknown)} names are unknown in this family, among them {_first(unknown, 5)}")
    return renamed


def is_modulated(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors are DCNv2's: its offset branches have three channels per kernel tap, DCNv1's two."""
    return all(
        len(tensor) == 3 * tensor.shape[-1] * tensor.shape[-2]
        for name, tensor in tensors.items()
        if name.endswith("conv_offset.weight") and tensor.ndim == 4  # loading reports other shapes
    )


def _first(names: Iterable[str], limit: int) -> str:
    return ", ".join(printable(name[:100]) for name in itertools.islice(names, limit))
