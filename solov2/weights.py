"""Weights: published and ImageNet files, the one door for checkpoints of every family, strict loading."""

from __future__ import annotations

import sys
import urllib.error
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from solov2.checkpoint import FORMAT, Checkpoint, load_file, write_file
from solov2.config import Config, ModelConfig, replace_model
from solov2.convert import class_names_of, convert_state_dict, is_modulated, to_mmdet, unwrap
from solov2.errors import InputError
from solov2.outputs import check_outputs

IMAGENET_WEIGHTS = {
    "resnet18": torchvision.models.ResNet18_Weights.IMAGENET1K_V1,
    "resnet34": torchvision.models.ResNet34_Weights.IMAGENET1K_V1,
    "resnet50": torchvision.models.ResNet50_Weights.IMAGENET1K_V1,
    "resnet101": torchvision.models.ResNet101_Weights.IMAGENET1K_V1,
    "resnext101_64x4d": torchvision.models.ResNeXt101_64X4D_Weights.IMAGENET1K_V1,
}


class PublishedFile(NamedTuple):
    """A file of weights that others have published, and the mask AP of that very file on COCO val2017 in percent."""

    url: str
    mask_ap: float


# mmdetection's file names end in the first eight digits of their SHA-256. The authors' files have no published hash,
# and are licensed for academic use.
_MMDET, _AUTHORS = "https://download.openmmlab.com/mmdetection/v2.0/solov2", "https://huggingface.co/xinlongwang/SOLO"
PUBLISHED_WEIGHTS = {
    "solov2_r50_fpn_1x": PublishedFile(
        f"{_MMDET}/solov2_r50_fpn_1x_coco/solov2_r50_fpn_1x_coco_20220512_125858-a357fa23.pth", 34.8
    ),
    "solov2_r50_fpn_3x": PublishedFile(
        f"{_MMDET}/solov2_r50_fpn_3x_coco/solov2_r50_fpn_3x_coco_20220512_125856-fed092d4.pth", 37.5
    ),
    "solov2_r101_fpn_3x": PublishedFile(f"{_AUTHORS}/resolve/main/SOLOv2_R101_3x.pth", 39.1),
    "solov2_r101_dcn_fpn_3x": PublishedFile(
        f"{_MMDET}/solov2_r101_dcn_fpn_3x_coco/solov2_r101_dcn_fpn_3x_coco_20220513_214734-16c966cb.pth", 41.2
    ),
    "solov2_x101_dcn_fpn_3x": PublishedFile(
        f"{_MMDET}/solov2_x101_dcn_fpn_3x_coco/solov2_x101_dcn_fpn_3x_coco_20220513_214337-aef41095.pth", 42.4
    ),
    "solov2_light_r18_fpn_3x": PublishedFile(
        f"{_MMDET}/solov2_light_r18_fpn_3x_coco/solov2_light_r18_fpn_3x_coco_20220511_083717-75fa355b.pth", 29.7
    ),
    "solov2_light_r34_fpn_3x": PublishedFile(f"{_AUTHORS}/resolve/main/SOLOv2_LIGHT_448_R34_3x.pth", 32.0),
    "solov2_light_r50_fpn_3x": PublishedFile(
        f"{_MMDET}/solov2_light_r50_fpn_3x_coco/solov2_light_r50_fpn_3x_coco_20220512_165256-c93a6074.pth", 33.7
    ),
    "solov2_light_r50_dcn_fpn_3x": PublishedFile(  # DCNv1
        f"{_AUTHORS}/resolve/main/SOLOv2_LIGHT_512_DCN_R50_3x.pth", 36.4
    ),
}
TRAITS = ("pixel_mean", "pixel_std", "channel_order", "stride_in_1x1", "modulated")  # fields a weights file decides


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint file of any family, once; foreign weights are converted.

    Raises:
        InputError: unreadable (see `solov2.checkpoint.load_file`), damaged, or of no family that is known.
    """
    content, source = load_file(path), str(path)
    if content.get("format") == FORMAT:
        return Checkpoint.from_content(content, source)
    try:
        weights, traits = convert_state_dict(unwrap(content))
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error
    return Checkpoint(source, weights, family=traits["family"], traits=traits, class_names=class_names_of(content))


def find_checkpoint(
    weights: str | Path | Checkpoint | None, name_or_config: str | Path | Config | ModelConfig | None = None
) -> Checkpoint | None:
    """The checkpoint that `weights` stands for.

    Args:
        weights: a file, "official" for the published file of the model, or a checkpoint that was read before.
        name_or_config: the model.

    Raises:
        InputError: the file does not exist, cannot be read or cannot be downloaded.
    """
    if weights is None or isinstance(weights, Checkpoint):
        return weights
    return read_checkpoint(official_weights(name_or_config) if weights == "official" else weights)


def official_weights(name: str | Path | Config | ModelConfig | None) -> Path:
    """Path of a model's published weights in torch's hub cache, where they are downloaded to on first use.

    Raises:
        InputError: nothing is published under this name, or the download failed; the sentence names the ways on.
    """
    name = Path(name).stem if isinstance(name, (str, Path)) else getattr(name, "name", None)
    if name is None:
        raise InputError("weights official are those of a model: name it too (--config MODEL)")
    if name not in PUBLISHED_WEIGHTS:
        raise InputError(
            f"no weights are published for {name}; there are some for: {', '.join(PUBLISHED_WEIGHTS)}; for others give "
            "a file"
        )
    url = PUBLISHED_WEIGHTS[name].url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if path.is_file():
        return path
    print(f"downloading {url}; its authors license it for academic use only", file=sys.stderr)
    start_of_hash = torch.hub.HASH_REGEX.search(path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), start_of_hash and start_of_hash.group(1))
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise InputError(
            f"the published weights could not be downloaded from {url} ({_reason(error)}); put that file into "
            f"{path.parent}, or give its path as weights"
        ) from error
    return path


def apply_weight_metadata(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """The configuration with what weights determine: pixel statistics, channel order, strides, kind of DCN.

    Raises:
        InputError: traits of a type that the configuration does not take.
    """
    return replace_model(config, {key: checkpoint.traits[key] for key in TRAITS if key in checkpoint.traits})


def weight_metadata(config: ModelConfig) -> dict[str, Any]:
    """What a checkpoint of this model carries beside its tensors, see `solov2.convert.convert_state_dict`."""
    values = {key: getattr(config, key) for key in TRAITS}
    return {"family": FORMAT, **{key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}}


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> bool:
    """Load a state dict strictly; only a category layer of another class count is re-initialized, with a warning.

    Args:
        model: takes the weights.
        state: our names.
        source: the file, for messages.

    Returns:
        Whether the category layer was re-initialized.

    Raises:
        InputError: missing, surplus or misshapen tensors, all listed.
    """
    own = model.state_dict()
    state = dict(state)
    reinitialized = False
    layer = "head.category_predictor"
    if f"{layer}.bias" in state and f"{layer}.bias" in own and len(state[f"{layer}.bias"]) != len(own[f"{layer}.bias"]):
        warnings.warn(
            f"{source} has {len(state[f'{layer}.bias'])} classes and the model {len(own[f'{layer}.bias'])}: "
            "the category layer is re-initialized, all other weights are kept",
            stacklevel=2,
        )
        state |= {f"{layer}.{part}": own[f"{layer}.{part}"] for part in ("weight", "bias")}
        reinitialized = True
    for name in own:  # files of families that do not count batches
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, own[name])
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    misshapen = [
        f"{name} is {list(state[name].shape)} and should be {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if missing or surplus or misshapen:
        parts = [
            f"{len(names)} {kind} ({_some(names)})"
            for kind, names in (("missing", missing), ("surplus", surplus), ("of another shape", misshapen))
            if names
        ]
        raise InputError(f"{source} does not fit this model: {'; '.join(parts)}")
    model.load_state_dict(state)
    return reinitialized


def load_pretrained_backbone(backbone: nn.Module, name: str, source: str) -> None:
    """ImageNet weights for a backbone.

    Args:
        backbone: a `ResNet` of the published width.
        name: its architecture.
        source: "imagenet" (torchvision's IMAGENET1K_V1 as in the reference, downloaded into torch's hub cache with its
            hash checked), "none", or the path of a torchvision state dict.

    Raises:
        InputError: download or file failed; the sentence names the ways on.
    """
    if source == "none":
        return
    if source == "imagenet":
        if name not in IMAGENET_WEIGHTS:
            raise InputError(f"no ImageNet weights exist for {name}; set train.pretrained_backbone to none or a file")
        enum = IMAGENET_WEIGHTS[name]
        try:
            state = enum.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except (urllib.error.URLError, OSError, RuntimeError) as error:
            raise InputError(
                f"ImageNet weights could not be downloaded from {enum.url} ({_reason(error)}); put that file into "
                f"{Path(torch.hub.get_dir()) / 'checkpoints'}, or set train.pretrained_backbone to a file or to "
                "none to start from random weights"
            ) from error
    else:
        state = load_file(source)
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    load_weights(backbone, state, str(source))


def convert_file(source: str | Path, target: str | Path, *, to: str = FORMAT, overwrite: bool = False) -> str:
    """Convert a checkpoint file.

    Args:
        source: a file of any family.
        target: file to write; folders are made as needed.
        to: "solov2", which keeps traits, configuration and class names beside the tensors, or "mmdet".
        overwrite: replace an existing target.

    Returns:
        One line on what was found and written.

    Raises:
        InputError: source unreadable or unknown, target there already or not writable, or a network that mmdetection
            has no names or no place for its traits.
    """
    check_outputs([("OUT", target)], overwrite=overwrite, inputs=[source])
    checkpoint = read_checkpoint(source)
    traits = checkpoint.traits
    if to == "mmdet":
        if traits.get("stride_in_1x1") or traits.get("channel_order", "rgb") != "rgb":
            raise InputError(f"{source} has an MSRA backbone, for which mmdetection has no SOLOv2 configuration")
        try:
            state = to_mmdet(checkpoint.weights)
        except ValueError as error:
            raise InputError(f"{source}: {error}") from error
        content: Mapping[str, Any] = {"state_dict": state, "meta": {"CLASSES": checkpoint.class_names}}
    else:
        content = replace(checkpoint, training=None).content()
    try:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        write_file(target, content)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}") from error
    layers = sum(name.endswith("conv_offset.weight") for name in checkpoint.weights)
    return (
        f"{source}: {checkpoint.family}, {len(checkpoint.weights)} tensors, "
        + (
            f"{layers} deformable layers ({'DCNv2' if is_modulated(checkpoint.weights) else 'DCNv1'}), "
            if layers
            else ""
        )
        + f"{traits.get('channel_order', 'rgb')} input, written to {target} under the names of {to}"
    )


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")


def _reason(error: BaseException) -> str:
    return " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
