"""Model names -> configuration -> real constructors -> strict load: the one place where the parts meet."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from solov2.checkpoint import Checkpoint
from solov2.compute import Compute
from solov2.config import Config, ModelConfig, changed_settings, load_config, override_config, replace_model
from solov2.data.categories import default_category_ids, default_class_names
from solov2.errors import InputError
from solov2.losses import SOLOv2Criterion
from solov2.models.fpn import FPN
from solov2.models.head import SOLOv2Head
from solov2.models.mask_feature import MaskFeatureHead
from solov2.models.optimize import use_winograd
from solov2.models.resnet import ResNet
from solov2.models.solov2 import SOLOv2
from solov2.targets import TargetAssigner
from solov2.weights import TRAITS, apply_weight_metadata, find_checkpoint, load_weights


def build_model(
    name_or_config: str | Path | Config | ModelConfig | None = None,
    *,
    weights: str | Path | Checkpoint | None = None,
    num_classes: int | None = None,
    device: str | torch.device | None = None,
    **overrides: Any,
) -> SOLOv2:
    """Build a SOLOv2, load weights into it, and return it in evaluation mode.

    Args:
        name_or_config: model name (`list_models`), path of a YAML file, or a configuration. May be left out where
            `weights` is a checkpoint of this library, which carries its configuration.
        weights: checkpoint file, ours or of a family that `solov2.convert` knows, or what
            `solov2.weights.read_checkpoint` made of one; "official" fetches the published file of this model; None
            leaves random weights.
        num_classes: another class count than the configuration's (or the file's). The category layer is then
            re-initialized, with a warning; all other weights are kept.
        device: where to put the model; default the CPU.
        overrides: fields of `solov2.config.ModelConfig`, e.g. score_threshold=0.3, input_scale=(1333, 640).

    Returns:
        The model, `.eval()`, with class_names from the file, else COCO's for 80 classes, else "class 0", "class 1", ...

    Raises:
        InputError (a ValueError): unknown name or override (close ones are listed), unreadable file, tensors that do
            not fit (all are named).
    """
    checkpoint = find_checkpoint(weights, name_or_config)
    config = _model_config(name_or_config, checkpoint)
    if checkpoint is not None:
        config = apply_weight_metadata(config, checkpoint)
        category_bias = checkpoint.weights.get("head.category_predictor.bias")
        if category_bias is not None:
            config = replace_model(config, {"num_classes": len(category_bias)})
    config = replace_model(config, overrides | ({} if num_classes is None else {"num_classes": num_classes}))
    class_names = None if checkpoint is None else checkpoint.class_names
    if class_names is None or len(class_names) != config.num_classes:
        class_names = default_class_names(config.num_classes)
    model = construct(config, class_names)
    model.category_ids = default_category_ids(class_names)
    if checkpoint is not None:
        load_weights(model, checkpoint.weights, checkpoint.source)
        if name_or_config is not None and checkpoint.config is not None:
            _warn_config_mismatch(checkpoint, config, ignore={*TRAITS, *overrides, "num_classes"})
        if checkpoint.category_ids is not None and len(checkpoint.category_ids) == len(class_names):
            model.category_ids = list(checkpoint.category_ids)
    return model.to(device or "cpu").eval()


def _model_config(given: str | Path | Config | ModelConfig | None, checkpoint: Checkpoint | None) -> ModelConfig:
    if isinstance(given, ModelConfig):
        return given
    if isinstance(given, Config):
        return given.model
    return resolve_config(given, checkpoint).model


def resolve_config(
    name: str | Path | None, checkpoint: Checkpoint | None, overrides: Mapping[str, Any] | None = None
) -> Config:
    """The configuration of a model name or YAML file, else the one that a checkpoint carries, with entries changed.

    Args:
        name: model name or path; None for what the checkpoint says.
        checkpoint: of any family; only this library's carry a configuration.
        overrides: as of `solov2.config.override_config`.

    Raises:
        InputError: neither says which model it is, or a name or an entry is wrong.
    """
    if name is not None:
        config: Config | None = load_config(name)
    elif checkpoint is None:
        raise InputError("name a model, or give a checkpoint of this library, which carries its configuration")
    else:
        config = checkpoint.configuration()
    if config is None:
        raise InputError(f"{checkpoint.source if checkpoint else ''} does not say which model it is; name the model")
    return override_config(config, overrides or {})


def _warn_config_mismatch(checkpoint: Checkpoint, config: ModelConfig, *, ignore: set[str]) -> None:
    """Grids, sizes and thresholds leave no trace in a tensor's shape, so weights of others would load unnoticed."""
    carried = (checkpoint.config or {}).get("model", {})
    now = {key: value for key, value in dataclasses.asdict(config).items() if key not in ignore}
    changed = changed_settings(carried, now)
    if changed:
        warnings.warn(
            f"{checkpoint.source} was trained with other settings than the named model: {', '.join(changed)}; without "
            "a named model its own are used",
            stacklevel=3,
        )


def construct(config: ModelConfig, class_names: Sequence[str]) -> SOLOv2:
    """The model of a configuration with fresh weights, in training mode. The one place where the parts meet.

    Raises:
        InputError: values that no network can be made of.
    """
    if len(class_names) != config.num_classes:
        raise InputError(f"{len(class_names)} class names for {config.num_classes} classes")
    try:
        backbone = ResNet(
            config.backbone,
            width=config.backbone_width,
            frozen_stages=config.frozen_stages,
            frozen_batch_norm=config.frozen_batch_norm,
            deformable=config.deformable_stages,
            modulated=config.modulated,
            stride_in_1x1=config.stride_in_1x1,
        )
        return SOLOv2(
            backbone=backbone,
            fpn=FPN(backbone.out_channels, config.fpn_channels),
            head=SOLOv2Head(
                config.fpn_channels,
                tower_channels=config.tower_channels,
                tower_depth=config.tower_depth,
                num_classes=config.num_classes,
                kernel_channels=config.mask_feature_channels,
                grid_sizes=config.grid_sizes,
                norm=config.head_norm,
                deformable_convs=config.deformable_tower_convs,
                modulated=config.modulated,
            ),
            mask_feature_head=MaskFeatureHead(
                config.fpn_channels,
                config.mask_hidden_channels,
                config.mask_feature_channels,
                norm=config.head_norm,
                deformable=config.deformable_mask_branch,
                modulated=config.modulated,
            ),
            class_names=class_names,
            settings=config.postprocess_settings,
            pixel_mean=config.pixel_mean,
            pixel_std=config.pixel_std,
            channel_order=config.channel_order,
            input_scale=config.input_scale,
        )
    except ValueError as error:
        raise InputError(f"this configuration makes no network: {error}") from error


def build_assigner(config: ModelConfig) -> TargetAssigner:
    """The target assigner that belongs to a model configuration."""
    return TargetAssigner(
        config.grid_sizes, config.scale_ranges, num_classes=config.num_classes, center_sigma=config.center_sigma
    )


def build_criterion(config: ModelConfig, *, mask_weight: float = 3.0) -> SOLOv2Criterion:
    """The criterion that belongs to a model configuration."""
    return SOLOv2Criterion(num_classes=config.num_classes, mask_weight=mask_weight)


def build_compute(config: Config, device: torch.device, precision: str | None = None) -> Compute:
    """Device, precision and layout of a configuration.

    Args:
        config: `train.memory_format` "auto" is channels last, except for wide networks with plain convolutions on a
            CPU: there the weight gradient of a 3x3 convolution of 64 channels and more takes 1.4 to 2.5 times as long
            in that layout (oneDNN 3.12, AVX2), and the rest gains little.
        device: where to compute.
        precision: default the one to train in.
    """
    wanted = config.train.memory_format
    if wanted == "auto":
        wide = max(config.model.fpn_channels, config.model.tower_channels) >= 64
        slow = device.type == "cpu" and wide and not _takes_winograd(config, device)
        wanted = "contiguous" if slow else "channels_last"
    layout = torch.channels_last if wanted == "channels_last" else torch.contiguous_format
    return Compute(device, precision or config.train.precision, layout)


def prepare_for_training(model: SOLOv2, config: Config, compute: Compute) -> SOLOv2:
    """The model on its device and in its layout, with Winograd convolutions where they pay."""
    if _takes_winograd(config, compute.device):
        use_winograd(model)
    compute.place(model)
    return model


def _takes_winograd(config: Config, device: torch.device) -> bool:
    return device.type == "cpu" and config.train.winograd and config.train.precision == "float32"
