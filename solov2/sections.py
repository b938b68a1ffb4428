"""The three sections of a configuration: model, data and train. The defaults are SOLOv2 R50-FPN with the 1x schedule
(paper section 3.1, mmdetection's constants). docs/configuration.md is generated from this file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from solov2.settings import PanopticSettings, PostprocessSettings, Settings, setting


@dataclass(frozen=True)
class ModelConfig(PostprocessSettings, PanopticSettings):
    """Architecture, preprocessing and post-processing of a model. Sizes are in pixels of the network input."""

    backbone: Literal["resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnext101_64x4d"] = setting(
        "resnet50", "residual network that extracts the image features"
    )
    backbone_width: int = setting(64, "channels of the stem; 64 in the published ResNets", minimum=1, maximum=16384)
    frozen_stages: int = setting(
        1, "frozen stages of the backbone; 0: none, 1: the stem and layer1, ... 4: all", minimum=0, maximum=4
    )
    frozen_batch_norm: bool = setting(
        True, "use the running statistics in training too; the affine parameters of unfrozen stages still train"
    )
    deformable_stages: bool = setting(False, "use deformable 3x3 convolutions in the bottlenecks of layer2 to layer4")
    fpn_channels: int = setting(256, "channels of the feature pyramid", minimum=1, maximum=16384)
    tower_channels: int = setting(512, "channels of the head's towers", minimum=1, maximum=16384)
    tower_depth: int = setting(4, "3x3 convolutions in each tower", minimum=1, maximum=100)
    deformable_tower_convs: int = setting(
        0, "deformable convolutions at the end of each tower; at most tower_depth", minimum=0
    )
    mask_hidden_channels: int = setting(128, "hidden channels of the mask branch", minimum=1, maximum=16384)
    mask_feature_channels: int = setting(
        256, "channels of the mask features, and so the length of a dynamic kernel", minimum=1, maximum=16384
    )
    num_stuff: int = setting(
        0,
        "number of stuff classes; 0: instances only, no semantic branch; panoptic models: training takes it from the "
        "annotations",
        minimum=0,
        maximum=254,
    )
    semantic_channels: int = setting(128, "hidden channels of the semantic branch", minimum=1, maximum=16384)
    deformable_mask_branch: bool = setting(False, "use deformable convolutions throughout the mask branch")
    modulated: bool = setting(True, "true: DCNv2; false: DCNv1 (offsets only), as in the authors' light R50-DCN")
    stride_in_1x1: bool = setting(False, "stride in the first 1x1 of a bottleneck (MSRA), as in weights from AdelaiDet")
    channel_order: Literal["rgb", "bgr"] = setting(
        "rgb", "channel order of the network input; bgr in weights from AdelaiDet"
    )
    head_norm: Literal["group", "batch"] = setting(
        "group",
        "norm of the towers, the mask and the semantic branch: group (channels must be multiples of 32), or batch for "
        "small models trained from scratch",
    )
    num_classes: int = setting(
        80, "number of classes; training takes it from the annotations", minimum=1, maximum=1_000_000
    )
    grid_sizes: tuple[int, ...] = setting(
        (40, 36, 24, 16, 12),
        "cells along each side of the grid, one number per pyramid level",
        minimum=1,
        maximum=1000,
        length=5,
    )
    scale_ranges: tuple[tuple[float, float], ...] = setting(
        ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048)),
        "[min, max] size of the instances assigned to each pyramid level, as sqrt(box area) in pixels",
        minimum=0,
        length=5,
    )
    center_sigma: float = setting(0.2, "size of the center region as a fraction of the box", minimum=0, maximum=1)
    input_scale: tuple[int, int] = setting(
        (1333, 800), "[max long edge, max short edge] of an image at test time", minimum=1, maximum=32768
    )
    pixel_mean: tuple[float, float, float] = setting(
        (123.675, 116.28, 103.53),
        "mean subtracted from each channel, in gray levels (0 to 255)",
        minimum=0,
        maximum=255,
    )
    pixel_std: tuple[float, float, float] = setting(
        (58.395, 57.12, 57.375), "standard deviation that each channel is divided by, in gray levels", above=0
    )

    @property
    def postprocess_settings(self) -> PostprocessSettings:
        """Only the thresholds and limits of post-processing."""
        names = [entry.name for entry in dataclasses.fields(PostprocessSettings)]
        return PostprocessSettings(**{name: getattr(self, name) for name in names})

    @property
    def panoptic_settings(self) -> PanopticSettings:
        """Only the thresholds for merging instances and semantic labels."""
        names = [entry.name for entry in dataclasses.fields(PanopticSettings)]
        return PanopticSettings(**{name: getattr(self, name) for name in names})

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Yield (setting, what it must be) for values that are valid on their own but not together."""
        if len(self.area_thresholds) != 5:
            yield "area_thresholds", "a list of 5 numbers, one per pyramid level"
        if any(low >= high for low, high in self.scale_ranges):
            yield "scale_ranges", "a list of 5 lists [min, max] with min below max"
        if self.input_scale[0] < self.input_scale[1]:
            yield "input_scale", "[long edge, short edge] with the short edge no longer than the long edge"
        if self.deformable_tower_convs > self.tower_depth:
            yield "deformable_tower_convs", f"from 0 to tower_depth, which is {self.tower_depth}"
        if self.backbone == "resnext101_64x4d" and self.backbone_width < 16:
            yield "backbone_width", "at least 16 for resnext101_64x4d, because of its 64 groups"
        semantic = ("semantic_channels",) if self.num_stuff else ()
        for name in ("tower_channels", "mask_hidden_channels", "mask_feature_channels", *semantic):
            if self.head_norm == "group" and getattr(self, name) % 32:
                yield name, "a multiple of 32, as head_norm group requires"


@dataclass(frozen=True)
class DataConfig(Settings):
    """Where the data is (paths are relative to `root` unless absolute) and how an image becomes a training sample."""

    section: ClassVar[str] = "data"

    root: str = setting("data/coco", "folder that the paths below are relative to")
    train_annotations: str = setting("annotations/instances_train2017.json", "training annotations in COCO's format")
    train_images: str = setting("train2017", "folder of the training images")
    val_annotations: str = setting("annotations/instances_val2017.json", "validation annotations in COCO's format")
    val_images: str = setting("val2017", "folder of the validation images")
    train_segments: str = setting(
        "auto",
        "panoptic models: folder of the PNGs of the training annotations; auto: their path without .json, or one level "
        "higher",
    )
    val_segments: str = setting("auto", "the same for the validation annotations")
    train_scales: tuple[int, ...] = setting(
        (800,), "short edges in pixels (at least one); one is drawn at random for each image", minimum=1, maximum=32768
    )
    train_long_edge: int = setting(
        1333, "maximum long edge in pixels; takes precedence over the short edge", minimum=1, maximum=32768
    )
    flip_probability: float = setting(0.5, "probability of flipping an image horizontally", minimum=0, maximum=1)
    dihedral: bool = setting(
        False, "also flip vertically and transpose at random, for images without a natural orientation"
    )
    color_jitter: tuple[float, float, float, float] = setting(
        (0, 0, 0, 0),
        "maximum random change of brightness, contrast, saturation (each as a fraction) and hue (in turns, at most "
        "0.5); 0: none",
        minimum=0,
        maximum=1,
    )
    crop_share: tuple[float, float] = setting(
        (1, 1),
        "[min, max] share of an image's area in a random crop of the same aspect ratio, which is then scaled to the "
        "training size; [1, 1]: no crop",
        above=0,
        maximum=1,
    )
    scale_jitter: tuple[float, float] = setting(
        (1, 1),
        "[min, max] random factor on the training size; above 1, what exceeds that size is cut off at random; [1, 1]: "
        "none",
        above=0,
    )
    copy_paste: float = setting(
        0, "probability of pasting instances of another image; not for panoptic models", minimum=0, maximum=1
    )
    aspect_groups: int = setting(
        2,
        "groups of images by width / height that never share a batch; 2: landscape and portrait, as in the reference; "
        "5 groups need less padding",
        minimum=1,
        maximum=5,
    )
    classes: tuple[str, ...] = setting(
        (), "names of the classes to train and evaluate; the others are treated as if they were not annotated; []: all"
    )
    keep_empty: bool = setting(False, "also train on images without instances; panoptic models: without any segment")
    min_image_size: int = setting(
        32, "images with an edge shorter than this, in pixels, are left out of training", minimum=0
    )
    crowd: Literal["ignore", "instance"] = setting(
        "ignore",
        "annotations with iscrowd 1: ignore (left out of training, ignored in evaluation, as COCO does), or instance "
        "(like all others, for files whose tool flags single objects)",
    )
    max_detections: int = setting(
        100,
        "detections per image and class that count in evaluation, those with the highest scores; 100: COCO's figures; "
        "for crowded images, raise it together with model.max_instances",
        minimum=100,
        maximum=1_000_000,
    )
    max_image_pixels: int = setting(
        178_956_970, "maximum width x height of an image file; a larger one is rejected before it is decoded", minimum=1
    )
    skip_broken_images: bool = setting(False, "skip images that cannot be read instead of ending the run")
    workers: int | Literal["auto"] = setting(
        "auto",
        "DataLoader workers per training process; 0: load in that process; auto: the CPU cores of this machine divided "
        "by its training processes, from 1 to 8",
        minimum=0,
    )
    shapes: bool = setting(False, "generate the dataset of colored shapes at root if it does not exist")
    shapes_size: int = setting(192, "side length of a generated image, in pixels", minimum=16, maximum=8192)
    shapes_train: int = setting(1000, "number of generated training images", minimum=1)
    shapes_val: int = setting(100, "number of generated validation images", minimum=1)
    shapes_seed: int = setting(0, "seed of the generated images", minimum=0, maximum=2**63 - 1)

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Yield (setting, what it must be) for values that are valid on their own but not together."""
        if not self.train_scales:
            yield "train_scales", "a list of at least one short edge"
        if self.color_jitter[3] > 0.5:
            yield "color_jitter", "a list of 4 numbers, each from 0 to 1, the last at most 0.5"
        for name in ("crop_share", "scale_jitter"):
            if getattr(self, name)[0] > getattr(self, name)[1]:
                yield name, "a list [min, max] with min at most max"

    @property
    def zoom(self) -> tuple[float, float]:
        """The smallest and largest factor by which random crops and sizes enlarge instances."""
        return self.scale_jitter[0] / self.crop_share[1] ** 0.5, self.scale_jitter[1] / self.crop_share[0] ** 0.5


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Optimization. The learning rate is for `reference_batch_size` images per step and scales linearly from there."""

    section: ClassVar[str] = "train"

    epochs: int = setting(12, "passes over the training images", minimum=1)
    batch_size: int = setting(2, "images per batch in each process", minimum=1)
    reference_batch_size: int = setting(
        16, "images per step that learning_rate is for; other batch sizes scale it linearly", minimum=1
    )
    accumulate: int = setting(1, "batches per optimizer step", minimum=1)
    optimizer: Literal["sgd", "adamw"] = setting("sgd", "SGD with momentum, as in the reference, or AdamW")
    learning_rate: float = setting(0.01, "learning rate for reference_batch_size images per step", above=0)
    momentum: float = setting(0.9, "momentum of sgd", minimum=0, below=1)
    weight_decay: float = setting(1e-4, "weight decay coefficient", minimum=0)
    decay_norms: bool = setting(True, "also apply weight decay to norms and biases, as the reference does")
    schedule: Literal["step", "cosine"] = setting("step", "how the learning rate decays")
    step_epochs: tuple[int, ...] = setting(
        (8, 11),
        "ascending; with schedule step, the learning rate is multiplied by 0.1 after each of these epochs",
        minimum=1,
    )
    warmup_steps: int = setting(500, "optimizer steps of linear learning rate warm-up", minimum=0)
    warmup_start: float = setting(0.001, "fraction of the learning rate in the first step", minimum=0, maximum=1)
    backbone_rates: tuple[float, float, float, float, float] = setting(
        (1.0, 1.0, 1.0, 1.0, 1.0),
        "factors of the learning rate of the backbone's stem and of its layer1 to layer4",
        minimum=0,
    )
    clip_norm: float = setting(35.0, "maximum L2 norm of all gradients together; 0: no clipping", minimum=0)
    mask_weight: float = setting(3.0, "weight of the mask loss", minimum=0)
    semantic_weight: float = setting(0.5, "weight of the semantic loss of panoptic models", minimum=0)
    semantic_auxiliary: float = setting(
        0.0,
        "weight of an auxiliary semantic loss of instance models, whose branch has model.semantic_channels channels "
        "and exists in training only; 0: none",
        minimum=0,
    )
    sync_batch_norm: bool = setting(
        False,
        "trained batch norms take their statistics from the images of all processes, instead of each from its own; "
        "needs an accelerator",
    )
    precision: Literal["float32", "tf32", "bf16", "fp16", "auto"] = setting(
        "tf32",
        "precision of the network in training; tf32: float32, but NVIDIA cards round the inputs of convolutions to 10 "
        "bits (torch's default); auto: the fastest of the device",
    )
    compile: bool = setting(
        False,
        "compile the network with torch.compile, once for all image sizes, which takes minutes at the start; a CPU "
        "needs a C++ compiler for it, and computes without Winograd convolutions",
    )
    recompute_activations: bool = setting(
        False,
        "save memory: keep few activations of backbone and mask branch, and recompute the others in the backward pass",
    )
    winograd: bool = setting(
        True, "Winograd F(4x4, 3x3) for wide 3x3 convolutions where it is faster: in float32 or tf32 training on a CPU"
    )
    memory_format: Literal["auto", "channels_last", "contiguous"] = setting(
        "auto", "tensor layout; auto: channels_last, except where that is slower on a CPU"
    )
    pretrained_backbone: str = setting(
        "imagenet",
        "weights that the backbone starts from: imagenet (torchvision's IMAGENET1K_V1), imagenet_v2 (IMAGENET1K_V2 of "
        "resnet50 and resnet101), timm:NAME (a model of timm; extra timm), none, or the path of a weights file",
    )
    seed: int = setting(0, "seed of all random choices in a run", minimum=0, maximum=2**63 - 1)
    evaluate_every: int = setting(
        1, "epochs between evaluations, plus one after the last epoch; 0: no evaluation", minimum=0
    )
    early_stopping: int = setting(
        0,
        "end the run after this many evaluations in a row without a better mask AP (panoptic models: PQ); 0: never",
        minimum=0,
    )
    checkpoint_every: int = setting(1, "epochs between checkpoints", minimum=1)
    checkpoint_steps: int = setting(1000, "optimizer steps between checkpoints inside an epoch; 0: none", minimum=0)
    keep_checkpoints: int = setting(2, "number of newest checkpoints to keep; the best one is always kept", minimum=1)
    ema_decay: float = setting(
        0.0,
        "decay of the weight average (EMA), which is then used for evaluation; 0: no average; try 1 - 10 / steps",
        minimum=0,
        below=1,
    )
    nonfinite: Literal["stop", "skip"] = setting(
        "stop", "after a step with a non-finite loss or gradient: stop, or skip it and continue"
    )
    # Python cannot wait for a process longer than 2**31 milliseconds.
    stall_seconds: int = setting(
        1800,
        "end the run if a DataLoader worker or another rank does not respond for this long",
        minimum=1,
        maximum=1_000_000,
    )
    deterministic: bool = setting(
        False, "bit-identical results for the same seed, number of processes and device, or an error"
    )
    log_every: int = setting(50, "optimizer steps between log lines", minimum=1)
    picture_images: int = setting(
        8, "maximum number of validation images in the final picture; 0: no picture", minimum=0
    )
    picture_score: float = setting(0.3, "minimum score of an instance in the final picture", minimum=0, maximum=1)

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Yield (setting, what it must be) for values that are valid on their own but not together."""
        if any(first >= second for first, second in zip(self.step_epochs, self.step_epochs[1:])):
            yield "step_epochs", "a list of ascending integers"
        if self.early_stopping and not self.evaluate_every:
            yield "early_stopping", "0 without evaluations (evaluate_every 0)"
