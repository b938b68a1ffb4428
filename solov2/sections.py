"""The three sections of a configuration: model, data, training. The defaults are SOLOv2 R50-FPN, 1x schedule (paper
section 3.1, constants of mmdetection); docs/configuration.md is made of this file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from solov2.settings import PostprocessSettings, Settings, setting


@dataclass(frozen=True)
class ModelConfig(PostprocessSettings):
    """Architecture, preprocessing and post-processing of one model. Sizes in pixels of the network input."""

    backbone: Literal["resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnext101_64x4d"] = setting(
        "resnet50", "residual network that reads the image"
    )
    backbone_width: int = setting(64, "channels of the stem; 64 is the published ResNet", minimum=1, maximum=16384)
    frozen_stages: int = setting(
        1, "of the backbone; 0: none, 1: the stem and layer1, ... 4: all", minimum=0, maximum=4
    )
    frozen_batch_norm: bool = setting(
        True, "keep the running statistics in training too; the affine of unfrozen stages still trains"
    )
    deformable_stages: bool = setting(False, "the 3x3 of every bottleneck in layer2..layer4 is deformable")
    fpn_channels: int = setting(256, "channels of the feature pyramid", minimum=1, maximum=16384)
    tower_channels: int = setting(512, "channels of the towers of the head", minimum=1, maximum=16384)
    tower_depth: int = setting(4, "3x3 convolutions of each tower", minimum=1, maximum=100)
    deformable_tower_convs: int = setting(
        0, "how many convolutions of each tower are deformable, counted from its end; at most tower_depth", minimum=0
    )
    mask_hidden_channels: int = setting(128, "channels inside the mask branch", minimum=1, maximum=16384)
    mask_feature_channels: int = setting(
        256, "channels of the mask features: the length of a dynamic kernel", minimum=1, maximum=16384
    )
    deformable_mask_branch: bool = setting(False, "all convolutions of the mask branch are deformable")
    modulated: bool = setting(True, "DCNv2; false is DCNv1 (offsets only), as in the authors' light R50-DCN")
    stride_in_1x1: bool = setting(False, "MSRA's bottleneck, in weights from AdelaiDet")
    channel_order: Literal["rgb", "bgr"] = setting("rgb", "of the input of the network; bgr in weights from AdelaiDet")
    head_norm: Literal["group", "batch"] = setting(
        "group",
        "norm of towers and mask branch: group, whose channels are multiples of 32, or batch for small models trained "
        "from scratch",
    )
    num_classes: int = setting(80, "classes; training takes it from its annotations", minimum=1, maximum=1_000_000)
    grid_sizes: tuple[int, ...] = setting(
        (40, 36, 24, 16, 12),
        "cells along each side of the grid of each level",
        minimum=1,
        maximum=1000,
        length=5,
    )
    scale_ranges: tuple[tuple[float, float], ...] = setting(
        ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048)),
        "[lowest, highest] size of the instances that each level learns, as sqrt(box area) in pixels",
        minimum=0,
        length=5,
    )
    center_sigma: float = setting(0.2, "size of the center region as a share of the box", minimum=0, maximum=1)
    input_scale: tuple[int, int] = setting(
        (1333, 800), "[long edge at most, short edge at most] of an image at test time", minimum=1, maximum=32768
    )
    pixel_mean: tuple[float, float, float] = setting(
        (123.675, 116.28, 103.53), "subtracted from each channel, in gray levels", minimum=0, maximum=255
    )
    pixel_std: tuple[float, float, float] = setting(
        (58.395, 57.12, 57.375), "each channel is divided by it, in gray levels", above=0
    )

    @property
    def postprocess_settings(self) -> PostprocessSettings:
        """The thresholds and limits alone."""
        names = [entry.name for entry in dataclasses.fields(PostprocessSettings)]
        return PostprocessSettings(**{name: getattr(self, name) for name in names})

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """(setting, what it must be) of values that are right alone and wrong together."""
        if len(self.area_thresholds) != 5:
            yield "area_thresholds", "a list of 5 numbers, one for each pyramid level"
        if any(low >= high for low, high in self.scale_ranges):
            yield "scale_ranges", "a list of 5 lists [lowest, highest] with lowest below highest"
        if self.input_scale[0] < self.input_scale[1]:
            yield "input_scale", "[long edge, short edge] with the short edge not above the long edge"
        if self.deformable_tower_convs > self.tower_depth:
            yield "deformable_tower_convs", f"from 0 to tower_depth, which is {self.tower_depth}"
        if self.backbone == "resnext101_64x4d" and self.backbone_width < 16:
            yield "backbone_width", "of at least 16 for resnext101_64x4d, whose 64 groups would be empty"
        for name in ("tower_channels", "mask_hidden_channels", "mask_feature_channels"):
            if self.head_norm == "group" and getattr(self, name) % 32:
                yield name, "a multiple of 32, which head_norm group needs"


@dataclass(frozen=True)
class DataConfig(Settings):
    """Where the data lies (paths below `root` unless absolute) and how an image becomes a training sample."""

    section: ClassVar[str] = "data"

    root: str = setting("data/coco", "folder that the four paths below are relative to")
    train_annotations: str = setting("annotations/instances_train2017.json", "file in COCO's format to train on")
    train_images: str = setting("train2017", "folder of its images")
    val_annotations: str = setting("annotations/instances_val2017.json", "file in COCO's format to evaluate on")
    val_images: str = setting("val2017", "folder of its images")
    train_scales: tuple[int, ...] = setting(
        (800,), "short edges in pixels, at least one; one is drawn for each image", minimum=1, maximum=32768
    )
    train_long_edge: int = setting(1333, "long edge at most; it wins over the short edge", minimum=1, maximum=32768)
    flip_probability: float = setting(0.5, "probability of mirroring an image left to right", minimum=0, maximum=1)
    dihedral: bool = setting(False, "all eight flips and quarter turns, for images without an up")
    keep_empty: bool = setting(False, "train on images without instances too")
    min_image_size: int = setting(32, "in pixels; images with a shorter edge are left out of training", minimum=0)
    skip_broken_images: bool = setting(False, "leave out images that cannot be read, instead of ending the run")
    workers: int = setting(2, "loading processes for each training process; 0: load in it", minimum=0)
    shapes: bool = setting(False, "generate the data set of colored shapes at root when it is not there")
    shapes_size: int = setting(192, "side of a generated image, in pixels", minimum=16, maximum=8192)
    shapes_train: int = setting(1000, "generated training images", minimum=1)
    shapes_val: int = setting(100, "generated validation images", minimum=1)
    shapes_seed: int = setting(0, "every generated image follows from it", minimum=0, maximum=2**63 - 1)

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """(setting, what it must be) of values that are right alone and wrong together."""
        if not self.train_scales:
            yield "train_scales", "a list of at least one short edge"


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Optimization. The learning rate belongs to `reference_batch_size` images and is scaled linearly from there."""

    section: ClassVar[str] = "train"

    epochs: int = setting(12, "passes over the training images", minimum=1)
    batch_size: int = setting(2, "images per process", minimum=1)
    reference_batch_size: int = setting(
        16, "images per step that learning_rate is meant for; others scale it", minimum=1
    )
    accumulate: int = setting(1, "batches per optimizer step", minimum=1)
    optimizer: Literal["sgd", "adamw"] = setting("sgd", "SGD with momentum, as in the reference, or AdamW")
    learning_rate: float = setting(0.01, "learning rate for reference_batch_size images per step", above=0)
    momentum: float = setting(0.9, "momentum of sgd", minimum=0, below=1)
    weight_decay: float = setting(1e-4, "pull of the weights toward 0", minimum=0)
    decay_norms: bool = setting(True, "weight decay on norms and biases too, as in the reference")
    schedule: Literal["step", "cosine"] = setting("step", "how the learning rate falls")
    step_epochs: tuple[int, ...] = setting(
        (8, 11), "ascending; schedule step multiplies the learning rate by 0.1 after each of these epochs", minimum=1
    )
    warmup_steps: int = setting(500, "optimizer steps in which the learning rate rises at the start", minimum=0)
    warmup_start: float = setting(0.001, "share of the learning rate in the first step", minimum=0, maximum=1)
    clip_norm: float = setting(35.0, "L2 norm that all gradients together are cut to; 0: no clipping", minimum=0)
    mask_weight: float = setting(3.0, "weight of the mask loss", minimum=0)
    precision: Literal["float32", "bf16", "fp16"] = setting("float32", "number format of the network in training")
    winograd: bool = setting(True, "wide 3x3 convolutions by F(4x4, 3x3) where it pays: training in float32 on a CPU")
    memory_format: Literal["auto", "channels_last", "contiguous"] = setting(
        "auto", "layout of the tensors; auto: channels_last but where a CPU is slower with it"
    )
    pretrained_backbone: str = setting(
        "imagenet", "imagenet (torchvision's IMAGENET1K_V1), none, or the path of a file"
    )
    seed: int = setting(0, "every random choice of a run follows from it", minimum=0, maximum=2**63 - 1)
    evaluate_every: int = setting(
        1, "epochs between evaluations; the last epoch is always evaluated unless this is 0", minimum=0
    )
    checkpoint_every: int = setting(1, "epochs between checkpoints", minimum=1)
    checkpoint_steps: int = setting(1000, "optimizer steps between checkpoints inside an epoch; 0: none", minimum=0)
    keep_checkpoints: int = setting(2, "newest checkpoints that stay; the best is kept beside them", minimum=1)
    ema_decay: float = setting(
        0.0,
        "decay of averaged weights, which are then evaluated; 0: no average; 1 - 10 / steps is a start",
        minimum=0,
        below=1,
    )
    nonfinite: Literal["stop", "skip"] = setting("stop", "after a step that is not finite: stop, or skip it and go on")
    # Python cannot wait longer for a process than 2**31 milliseconds.
    stall_seconds: int = setting(
        1800,
        "a loading process or another rank that is silent for so long ends the run",
        minimum=1,
        maximum=1_000_000,
    )
    deterministic: bool = setting(False, "the same bits for the same seed, processes and device, or an error")
    log_every: int = setting(50, "optimizer steps between lines of the log", minimum=1)
    picture_images: int = setting(8, "validation images in the picture at the end", minimum=1)
    picture_score: float = setting(0.3, "minimum score of an instance in the picture", minimum=0, maximum=1)

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """(setting, what it must be) of values that are right alone and wrong together."""
        if any(first >= second for first, second in zip(self.step_epochs, self.step_epochs[1:])):
            yield "step_epochs", "a list of ascending integers"
