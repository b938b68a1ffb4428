"""Assemble a model: name -> configuration -> constructors -> strictly loaded weights."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from solov2 import distributed
from solov2.checkpoint import Checkpoint
from solov2.class_rows import match_classes, match_stuff_classes
from solov2.compute import HALF_TYPES, Compute, select_precision
from solov2.config import Config, ModelConfig, changed_settings, load_config, override_config, replace_model
from solov2.data.categories import (
    default_category_ids,
    default_class_names,
    default_stuff_category_ids,
    default_stuff_names,
)
from solov2.errors import InputError
from solov2.losses import SOLOv2Criterion
from solov2.models.fpn import FPN
from solov2.models.head import SOLOv2Head
from solov2.models.layers import synchronize_batch_norms
from solov2.models.mask_feature import MaskFeatureHead
from solov2.models.optimize import use_winograd
from solov2.models.resnet import ResNet
from solov2.models.semantic import SemanticHead
from solov2.models.solov2 import SOLOv2
from solov2.targets import TargetAssigner
from solov2.weights import (
    CATEGORY_LAYER,
    SEMANTIC_HEAD,
    STUFF_LAYER,
    TRAITS,
    apply_weight_metadata,
    check_fits,
    find_checkpoint,
    load_weights,
    semantic_tensors,
)

LOG = logging.getLogger(__name__)


def build_model(
    name_or_config: str | Path | Config | ModelConfig | None = None,
    *,
    weights: str | Path | Checkpoint | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    stuff_names: Sequence[str] | None = None,
    device: str | torch.device | None = None,
    **overrides: Any,
) -> SOLOv2:
    """Build a SOLOv2, load weights into it, and return it in evaluation mode.

    Args:
        name_or_config: model name (`list_models`), path of a YAML file, or a configuration. Optional if `weights` is a
            checkpoint of this library, which carries its configuration.
        weights: checkpoint file of this library or of a family that `solov2.convert` knows, or a checkpoint read by
            `solov2.weights.read_checkpoint`; "official" downloads the published file of this model ("official:authors"
            that of this family); None keeps random weights.
        num_classes: number of classes; default: the file's, or else the configuration's. If it differs from the file's,
            the category layer is re-initialized, with a warning; all other weights are kept.
        class_names: names of the classes; default: the file's. Classes that the file has under the same name keep their
            weights in the category layer; the others are re-initialized, and a warning lists both. If the file has no
            names, the layer is kept or re-initialized as a whole, as with `num_classes`.
        stuff_names: names of the stuff classes of a panoptic model; default: the file's. They are matched in the same
            way. If only the model or only the file has a semantic head, it is re-initialized or left out, with a
            warning; all other weights are kept.
        device: device of the model; default: the CPU.
        overrides: fields of `solov2.config.ModelConfig`, e.g. score_threshold=0.3, input_scale=(1333, 640).

    Returns:
        The model in evaluation mode. Its `class_names` are those given, else the file's, else COCO's for 80 classes,
        else "class 0", "class 1", ...

    Raises:
        InputError (a ValueError): an unknown name or override (the message suggests close ones), an invalid value, a
            file that cannot be read or downloaded, or tensors that do not fit (the message lists them).
    """
    checkpoint = find_checkpoint(weights, name_or_config)
    given = _given_config(name_or_config, checkpoint)
    config = given.model
    if checkpoint is not None:
        config = fit_config(config, checkpoint)
    if stuff_names is not None:
        config = replace_model(config, {"num_stuff": len(stuff_names)})
    if class_names is not None and num_classes is None:
        num_classes = len(class_names)
    config = replace_model(config, overrides | ({} if num_classes is None else {"num_classes": num_classes}))
    names = class_names or (None if checkpoint is None else checkpoint.class_names)
    if names is None or class_names is None and len(names) != config.num_classes:
        names = default_class_names(config.num_classes)
    stuff = stuff_names or (None if checkpoint is None else checkpoint.stuff_names)
    if stuff is None or stuff_names is None and len(stuff) != config.num_stuff:
        stuff = default_stuff_names(config.num_stuff)
    if checkpoint is not None:
        _check_architecture(config, names, checkpoint)
    model = construct(config, names, stuff)
    whole = Config(given.name, config).to_dict()
    model.config = {key: whole[key] for key in ("name", "model")}  # without the folders of a run
    model.category_ids = default_category_ids(names)
    model.stuff_category_ids = default_stuff_category_ids(stuff, model.category_ids)
    if checkpoint is not None:
        weights_by_name = checkpoint.weights
        if class_names is not None:
            weights_by_name = match_classes(model, weights_by_name, checkpoint)
        if stuff_names is not None:
            weights_by_name = match_stuff_classes(model, weights_by_name, checkpoint)
        load_weights(model, weights_by_name, checkpoint.source)
        if name_or_config is not None and checkpoint.config is not None:
            _warn_config_mismatch(checkpoint, config, ignore={*TRAITS, *overrides, "num_classes", "num_stuff"})
        if checkpoint.category_ids is not None and class_names is None and len(checkpoint.category_ids) == len(names):
            model.category_ids = list(checkpoint.category_ids)
        stuff_ids = checkpoint.stuff_category_ids
        if stuff_ids is not None and stuff_names is None and len(stuff_ids) == len(stuff):
            model.stuff_category_ids = list(stuff_ids)
    return model.to(device or "cpu").eval()


def fit_config(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """The configuration with the traits and the numbers of classes of a checkpoint.

    Raises:
        InputError: a trait has an invalid value.
    """
    config = apply_weight_metadata(config, checkpoint)
    category_bias = checkpoint.weights.get(f"{CATEGORY_LAYER}.bias")
    if category_bias is not None:
        config = replace_model(config, {"num_classes": len(category_bias)})
    stuff_bias = checkpoint.weights.get(f"{STUFF_LAYER}.bias")
    if stuff_bias is not None and len(stuff_bias) > 1 and config.num_stuff:
        config = replace_model(config, {"num_stuff": len(stuff_bias) - 1})
    return config


def _check_architecture(config: ModelConfig, class_names: Sequence[str], checkpoint: Checkpoint) -> None:
    """Check that the weights fit, before memory is allocated for whatever network a file's configuration describes.

    Only the category layer and the stuff layer, or a whole semantic head, may differ.

    Raises:
        InputError: other tensors differ.
    """
    with torch.device("meta"):
        expected = construct(config, class_names).state_dict()
    both_panoptic = semantic_tensors(expected) and semantic_tensors(checkpoint.weights)
    replaceable = (f"{CATEGORY_LAYER}.", f"{STUFF_LAYER if both_panoptic else SEMANTIC_HEAD}.")
    expected, stored = (
        {name: tensor for name, tensor in state.items() if not name.startswith(replaceable)}
        for state in (expected, checkpoint.weights)
    )
    check_fits(expected, stored, checkpoint.source)


def load(path: str | Path, device: str | torch.device | None = None) -> SOLOv2:
    """Load a model from a file that contains its configuration: one written by `SOLOv2.save` or by a training run.

    Args:
        path: file to read.
        device: device of the model; default: the CPU.

    Returns:
        The model in evaluation mode, with the names, category ids, thresholds and limits of the file.

    Raises:
        InputError: the file cannot be read, or has no configuration (`build_model` loads such files by model name).
    """
    return build_model(weights=path, device=device)


def _given_config(given: str | Path | Config | ModelConfig | None, checkpoint: Checkpoint | None) -> Config:
    if isinstance(given, ModelConfig):
        return Config("custom", given)
    return given if isinstance(given, Config) else resolve_config(given, checkpoint)


def resolve_config(
    name: str | Path | None, checkpoint: Checkpoint | None, overrides: Mapping[str, Any] | None = None
) -> Config:
    """The configuration of a model name or YAML file, or else of a checkpoint, with overrides applied.

    Args:
        name: model name or path; None for the checkpoint's configuration.
        checkpoint: of any family; only those of this library contain a configuration.
        overrides: as for `solov2.config.override_config`.

    Raises:
        InputError: neither a name nor a configuration in the checkpoint is given, or a name or override is invalid.
    """
    if name is not None:
        config: Config | None = load_config(name)
    elif checkpoint is None:
        raise InputError("name a model, or give a checkpoint of this library, which carries its configuration")
    else:
        config = checkpoint.configuration()
    if config is None:
        raise InputError(f"{checkpoint.source if checkpoint else ''} carries no configuration; name the model")
    return override_config(config, overrides or {})


def _warn_config_mismatch(checkpoint: Checkpoint, config: ModelConfig, *, ignore: set[str]) -> None:
    """Warn about settings that loading cannot check, since no tensor shape depends on them (grids, thresholds, ...)."""
    carried = (checkpoint.config or {}).get("model", {})
    now = {key: value for key, value in dataclasses.asdict(config).items() if key not in ignore}
    changed = changed_settings(carried, now)
    if changed:
        LOG.warning(
            "%s was trained with other settings than the named model: %s; omit the model name to use the checkpoint's "
            "settings",
            checkpoint.source,
            ", ".join(changed),
        )


def construct(config: ModelConfig, class_names: Sequence[str], stuff_names: Sequence[str] | None = None) -> SOLOv2:
    """Construct the model of a configuration, with newly initialized weights, in training mode.

    Args:
        config: with `num_stuff` above 0 the model has a semantic head.
        class_names: one per class.
        stuff_names: one per stuff class; default: `solov2.data.categories.default_stuff_names`.

    Raises:
        InputError: no network can be built with these values, or the number of class names is wrong.
    """
    if len(class_names) != config.num_classes:
        raise InputError(f"{len(class_names)} class names for {config.num_classes} classes")
    stuff_names = default_stuff_names(config.num_stuff) if stuff_names is None else stuff_names
    if len(stuff_names) != config.num_stuff:
        raise InputError(f"{len(stuff_names)} stuff names for {config.num_stuff} stuff classes")
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
            semantic_head=SemanticHead(
                config.fpn_channels, config.semantic_channels, config.num_stuff, norm=config.head_norm
            )
            if config.num_stuff
            else None,
            panoptic_settings=config.panoptic_settings,
            stuff_names=stuff_names,
        )
    except ValueError as error:
        raise InputError(f"no network can be built from this configuration: {error}") from error


def add_auxiliary_head(model: SOLOv2, config: Config) -> SOLOv2:
    """Add the head of the auxiliary semantic loss to an instance model, if `train.semantic_auxiliary` is above 0.

    The head has one logit per class and one for the background, and runs in training mode only. Optimized copies,
    exported files and the weights that `build_model` reads do not contain it.

    Args:
        model: built from `config.model`; changed in place.
        config: of the training run.

    Returns:
        The same model.
    """
    if config.train.semantic_auxiliary:
        channels = (config.model.fpn_channels, config.model.semantic_channels)
        with model.device:
            model.auxiliary_head = SemanticHead(*channels, model.num_classes, norm=config.model.head_norm)
    return model


def build_assigner(config: ModelConfig) -> TargetAssigner:
    """The target assigner for a model configuration."""
    return TargetAssigner(
        config.grid_sizes, config.scale_ranges, num_classes=config.num_classes, center_sigma=config.center_sigma
    )


def build_criterion(config: ModelConfig, *, mask_weight: float = 3.0, semantic_weight: float = 0.5) -> SOLOv2Criterion:
    """The criterion for a model configuration."""
    return SOLOv2Criterion(num_classes=config.num_classes, mask_weight=mask_weight, semantic_weight=semantic_weight)


def build_compute(config: Config, device: torch.device, precision: str | None = None) -> Compute:
    """Device, precision and memory layout for a configuration.

    Args:
        config: with `train.memory_format` "auto" the layout is channels last, except for wide networks without
            Winograd convolutions on a CPU: in that layout, the weight gradient of a 3x3 convolution with 64 or more
            channels takes 1.4 to 2.5 times as long (oneDNN 3.12, AVX2), and the rest gains little.
        device: device to compute on.
        precision: a name that `solov2.compute.select_precision` takes; default: the training precision of `config`.
    """
    precision = select_precision(precision or config.train.precision, device)
    wanted = config.train.memory_format
    if wanted == "auto":
        wide = max(config.model.fpn_channels, config.model.tower_channels) >= 64
        slow = device.type == "cpu" and wide and not _uses_winograd(config, device, precision)
        wanted = "contiguous" if slow else "channels_last"
    layout = torch.channels_last if wanted == "channels_last" else torch.contiguous_format
    return Compute(device, precision, layout)


def prepare_for_training(model: SOLOv2, config: Config, compute: Compute) -> SOLOv2:
    """Move the model to its device and layout, and apply the settings of `config.train` that change how it computes.

    These are synchronized batch norms, recomputed activations, Winograd convolutions and compilation.

    Returns:
        The same model, changed in place.

    Raises:
        InputError: a batch norm would be trained on a single value per channel (the 1 x 1 map of one small image), or
            would update its statistics twice because activations are recomputed; batch norms would be synchronized on a
            CPU; or there is no compiler.
    """
    trains_batch_norm = not config.model.frozen_batch_norm or config.model.head_norm == "batch"
    shrink = min(1, config.data.scale_jitter[0])
    scale = int(shrink * min(config.data.train_scales))
    if trains_batch_norm and config.train.batch_size == 1 and scale <= 32:
        raise InputError(
            f"batch norm cannot be trained on one image whose last feature map is 1 x 1: raise data.train_scales "
            f"({scale}{', with data.scale_jitter' if shrink < 1 else ''}) above 32 or train.batch_size (1)"
        )
    if config.train.recompute_activations and trains_batch_norm:
        raise InputError(
            "train.recompute_activations would update the running statistics of batch norms twice: set "
            "model.frozen_batch_norm to true and model.head_norm to group, or recompute_activations to false"
        )
    if config.train.sync_batch_norm and distributed.world_size() > 1:
        if compute.device.type == "cpu":
            raise InputError(
                "torch has no synchronized batch norm for a CPU: set train.sync_batch_norm to false or --device to an "
                "accelerator"
            )
        if not synchronize_batch_norms(model.train()):
            LOG.warning("train.sync_batch_norm changes nothing: no batch norm of this model is trained")
    model.recompute_activations(config.train.recompute_activations)
    if _uses_winograd(config, compute.device, compute.precision):
        use_winograd(model)
    compute.place(model)
    if config.train.compile:
        if compute.device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
            raise InputError("train.compile needs a C++ compiler on a CPU, such as g++; install one, or turn it off")
        model.compile(dynamic=True)
    return model


def _uses_winograd(config: Config, device: torch.device, precision: str) -> bool:
    wanted = config.train.winograd and not config.train.compile  # whose loops depend on the size of the maps
    return device.type == "cpu" and wanted and HALF_TYPES[precision] is None
