"""The weights that a backbone starts from: ImageNet's, by torchvision or timm, or those of a file."""

from __future__ import annotations

import urllib.error
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import (
    ResNet18_Weights,
    ResNet34_Weights,
    ResNet50_Weights,
    ResNet101_Weights,
    ResNeXt101_64X4D_Weights,
)

from solov2.checkpoint import check_finite, load_file
from solov2.convert import unwrap
from solov2.errors import InputError
from solov2.weights import load_weights

TIMM = "timm:"
IMAGENET_WEIGHTS: dict[str, dict[str, Any]] = {
    "imagenet": {
        "resnet18": ResNet18_Weights.IMAGENET1K_V1,
        "resnet34": ResNet34_Weights.IMAGENET1K_V1,
        "resnet50": ResNet50_Weights.IMAGENET1K_V1,
        "resnet101": ResNet101_Weights.IMAGENET1K_V1,
        "resnext101_64x4d": ResNeXt101_64X4D_Weights.IMAGENET1K_V1,
    },
    "imagenet_v2": {
        "resnet50": ResNet50_Weights.IMAGENET1K_V2,
        "resnet101": ResNet101_Weights.IMAGENET1K_V2,
    },
}


def load_pretrained_backbone(backbone: nn.Module, name: str, source: str) -> None:
    """Load ImageNet weights into a backbone, strictly; a classifier `fc` is left out.

    Args:
        backbone: a `ResNet` of the published width.
        name: its architecture.
        source: "imagenet" (torchvision's IMAGENET1K_V1, as in the reference) or "imagenet_v2" (IMAGENET1K_V2), both
            downloaded into torch's hub cache and verified by their hashes, "timm:NAME" (a model of timm, downloaded
            into its cache), "none", or the path of a torchvision state dict.

    Raises:
        InputError: no such weights, failed download or unusable file; the message says what to do.
    """
    if source == "none":
        return
    if source in IMAGENET_WEIGHTS:
        state = _torchvision_state(name, source)
    elif source.startswith(TIMM):
        state = _timm_state(source.removeprefix(TIMM))
    else:
        state = unwrap(load_file(source))
        check_finite(state, source)
    load_weights(backbone, {key: value for key, value in state.items() if not key.startswith("fc.")}, source)


def _torchvision_state(name: str, source: str) -> Mapping[str, Tensor]:
    known = IMAGENET_WEIGHTS[source]
    if name not in known:
        others = [other for other, weights in IMAGENET_WEIGHTS.items() if name in weights]
        raise InputError(
            f"no {source} weights exist for {name}; set train.pretrained_backbone to {', '.join([*others, 'none'])} or "
            "a file"
        )
    try:
        return known[name].get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise InputError(
            f"ImageNet weights could not be downloaded from {known[name].url} ({_reason(error)}); put that file into "
            f"{Path(torch.hub.get_dir()) / 'checkpoints'}, or set train.pretrained_backbone to a file or to "
            "none to start from random weights"
        ) from error


def _timm_state(name: str) -> Mapping[str, Tensor]:
    """The weights of a model of timm, whose ResNets have torchvision's names."""
    try:
        import timm
    except ImportError as error:
        raise InputError("timm is not installed: pip install 'solov2[timm]'") from error
    if not timm.is_model_pretrained(name):  # timm would build some of these with random weights
        raise InputError(f"timm has no pretrained weights {name!r}; timm.list_pretrained('res*') lists those it has")
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # of a library that changes between versions
        raise InputError(
            f"the weights {name!r} of timm could not be downloaded or read ({_reason(error)}); download them once "
            "with internet access, or set train.pretrained_backbone to a file"
        ) from error


def _reason(error: BaseException) -> str:
    return " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
