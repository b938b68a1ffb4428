"""Model names -> configuration -> real constructors -> strict load."""

from __future__ import annotations

import dataclasses
import sys
import urllib.error
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from solov2.checkpoint import is_own, load_file
from solov2.config import Config, InputError, ModelConfig, changed_settings, load_config, replace_model
from solov2.convert import read_weights
from solov2.losses import SOLOv2Criterion
from solov2.models.fpn import FPN
from solov2.models.head import SOLOv2Head
from solov2.models.mask_feature import MaskFeatureHead
from solov2.models.resnet import ResNet
from solov2.models.solov2 import SOLOv2
from solov2.models.winograd import use_winograd
from solov2.targets import TargetAssigner

# COCO numbered 91 categories and annotated 80 of them.
COCO_CATEGORY_IDS = tuple(sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}))
COCO_CLASSES = tuple(
    (
        "person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|stop sign|"
        "parking meter|bench|bird|cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|backpack|umbrella|handbag|"
        "tie|suitcase|frisbee|skis|snowboard|sports ball|kite|baseball bat|baseball glove|skateboard|surfboard|"
        "tennis racket|bottle|wine glass|cup|fork|knife|spoon|bowl|banana|apple|sandwich|orange|broccoli|carrot|"
        "hot dog|pizza|donut|cake|chair|couch|potted plant|bed|dining table|toilet|tv|laptop|mouse|remote|"
        "keyboard|cell phone|microwave|oven|toaster|sink|refrigerator|book|clock|vase|scissors|teddy bear|"
        "hair drier|toothbrush"
    ).split("|")
)

IMAGENET_WEIGHTS = {
    "resnet18": torchvision.models.ResNet18_Weights.IMAGENET1K_V1,
    "resnet34": torchvision.models.ResNet34_Weights.IMAGENET1K_V1,
    "resnet50": torchvision.models.ResNet50_Weights.IMAGENET1K_V1,
    "resnet101": torchvision.models.ResNet101_Weights.IMAGENET1K_V1,
    "resnext101_64x4d": torchvision.models.ResNeXt101_64X4D_Weights.IMAGENET1K_V1,
}


# What is published for each model. Names of mmdetection's files end in the first eight digits of their SHA-256; the
# authors' files have no published hash. All of them are for academic use by the authors' licence.
_MMDET, _AUTHORS = "https://download.openmmlab.com/mmdetection/v2.0/solov2", "https://huggingface.co/xinlongwang/SOLO"
PUBLISHED_WEIGHTS = {
    "solov2_r50_fpn_1x": f"{_MMDET}/solov2_r50_fpn_1x_coco/solov2_r50_fpn_1x_coco_20220512_125858-a357fa23.pth",
    "solov2_r50_fpn_3x": f"{_MMDET}/solov2_r50_fpn_3x_coco/solov2_r50_fpn_3x_coco_20220512_125856-fed092d4.pth",
    "solov2_r101_fpn_3x": f"{_AUTHORS}/resolve/main/SOLOv2_R101_3x.pth",
    "solov2_r101_dcn_fpn_3x": (
        f"{_MMDET}/solov2_r101_dcn_fpn_3x_coco/solov2_r101_dcn_fpn_3x_coco_20220513_214734-16c966cb.pth"
    ),
    "solov2_x101_dcn_fpn_3x": (
        f"{_MMDET}/solov2_x101_dcn_fpn_3x_coco/solov2_x101_dcn_fpn_3x_coco_20220513_214337-aef41095.pth"
    ),
    "solov2_light_r18_fpn_3x": (
        f"{_MMDET}/solov2_light_r18_fpn_3x_coco/solov2_light_r18_fpn_3x_coco_20220511_083717-75fa355b.pth"
    ),
    "solov2_light_r34_fpn_3x": f"{_AUTHORS}/resolve/main/SOLOv2_LIGHT_448_R34_3x.pth",
    "solov2_light_r50_fpn_3x": (
        f"{_MMDET}/solov2_light_r50_fpn_3x_coco/solov2_light_r50_fpn_3x_coco_20220512_165256-c93a6074.pth"
    ),
    "solov2_light_r50_dcn_fpn_3x": f"{_AUTHORS}/resolve/main/SOLOv2_LIGHT_512_DCN_R50_3x.pth",  # DCNv1
}
TRAITS = ("pixel_mean", "pixel_std", "channel_order", "stride_in_1x1", "modulated")  # fields a weights file decides


def build_model(
    name_or_config: str | Path | Config | ModelConfig | None = None,
    *,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    device: str | torch.device | None = None,
    **overrides: Any,
) -> SOLOv2:
    """Build a SOLOv2, load weights into it, and return it in evaluation mode.

    Args:
        name_or_config: model name (`list_models`), path of a YAML file, or a configuration. May be left out where
            `weights` is a checkpoint of this library, which carries its configuration.
        weights: checkpoint file, ours or of a family that `solov2.convert` knows; "official" fetches the published file
            of this model (`official_weights`); None leaves random weights.
        num_classes: another class count than the configuration's (or the file's). The category layer is then made anew
            and said so; all other weights are kept.
        device: where to put the model; default the CPU.
        overrides: fields of `solov2.config.ModelConfig`, e.g. score_threshold=0.3, input_scale=(1333, 640).

    Returns:
        The model, `.eval()`, with class_names from the file, else COCO's for 80 classes, else "class 0", "class 1", ...

    Raises:
        InputError (a ValueError): unknown name or override (close ones are listed), unreadable file, tensors that do
            not fit (all are named).
    """
    weights = find_weights(weights, name_or_config)
    content = load_file(weights) if weights is not None else None
    config = _model_config(name_or_config, content, weights)
    state, class_names = None, None
    if content is not None:
        state, traits, class_names = read_weights(content, str(weights))
        category_bias = state.get("head.category_predictor.bias")
        fields = {key: traits[key] for key in TRAITS if key in traits}
        config = replace_model(config, fields | ({} if category_bias is None else {"num_classes": len(category_bias)}))
    config = replace_model(config, overrides | ({} if num_classes is None else {"num_classes": num_classes}))
    if class_names is None or len(class_names) != config.num_classes:
        class_names = default_class_names(config.num_classes)
    model = construct(config, class_names)
    if state is not None:
        load_weights(model, state, str(weights))
        if name_or_config is not None and is_own(content):
            _say_what_differs(content, config, str(weights), besides={*TRAITS, *overrides, "num_classes"})
    model.category_ids = _category_ids(content, class_names)
    return model.to(device or "cpu").eval()


def _say_what_differs(content: Mapping[str, Any], config: ModelConfig, source: str, *, besides: set[str]) -> None:
    """Grids, sizes and thresholds leave no trace in a tensor's shape; weights of other ones would load unnoticed."""
    carried = content.get("config", {}).get("model", {})
    now = {key: value for key, value in dataclasses.asdict(config).items() if key not in besides}
    changed = changed_settings(carried, now)
    if changed:
        warnings.warn(
            f"{source} was trained with other settings than the named model: {', '.join(changed)}; without a named "
            "model its own hold",
            stacklevel=3,
        )


def _category_ids(content: Mapping[str, Any] | None, class_names: Sequence[str]) -> list[int]:
    """The id of each label in annotation files: the training file's, COCO's for COCO's classes, else label + 1."""
    if content is not None and is_own(content) and len(content.get("category_ids", [])) == len(class_names):
        return list(content["category_ids"])
    if list(class_names) == list(COCO_CLASSES):
        return list(COCO_CATEGORY_IDS)
    return list(range(1, len(class_names) + 1))


def find_weights(
    weights: str | Path | None, name_or_config: str | Path | Config | ModelConfig | None
) -> str | Path | None:
    """`weights` as it is, or where "official" stands for it, the path of the published file of the model.

    Raises:
        InputError: the file does not exist, or cannot be had.
    """
    if weights == "official":
        return official_weights(name_or_config)
    if weights is not None and not Path(weights).is_file():
        raise InputError(f"weights file {weights} does not exist")
    return weights


def official_weights(name: str | Path | Config | ModelConfig | None) -> Path:
    """Path of a model's published weights in torch's hub cache, where they are downloaded to on first use.

    Raises:
        InputError: nothing is published under this name, or the download failed; the sentence names the ways on.
    """
    name = Path(name).stem if isinstance(name, (str, Path)) else getattr(name, "name", None)
    if name not in PUBLISHED_WEIGHTS:
        raise InputError(
            f"no weights are published for {name}; there are some for: {', '.join(PUBLISHED_WEIGHTS)}; for others give "
            "a file"
        )
    url = PUBLISHED_WEIGHTS[name]
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


def fit_to_weights(config: ModelConfig, weights: str | Path) -> ModelConfig:
    """The configuration with what a weights file fixes: pixel statistics, channel order, strides, kind of DCN.

    Raises:
        InputError: the file cannot be read, or is of no family that is known.
    """
    content = load_file(weights)
    traits = content.get("traits", {}) if is_own(content) else read_weights(content, str(weights))[1]
    return replace_model(config, {key: traits[key] for key in TRAITS if key in traits})


def traits_of(config: ModelConfig) -> dict[str, Any]:
    """What a checkpoint of this model carries beside its tensors, see `solov2.convert.convert_state_dict`."""
    values = {key: getattr(config, key) for key in TRAITS}
    return {"family": "solov2", **{key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}}


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


def prepare_for_training(model: SOLOv2, config: Config, device: torch.device) -> SOLOv2:
    """The model on the device in the layout of `choose_memory_format`, with Winograd convolutions where they pay."""
    if _takes_winograd(config, device):
        use_winograd(model)
    return model.to(device, memory_format=choose_memory_format(config, device))


def choose_memory_format(config: Config, device: torch.device) -> torch.memory_format:
    """Layout of images and weights that `train.memory_format` stands for.

    "auto" is channels last, except for wide networks with plain convolutions on a CPU: there the weight gradient of a
    3x3 convolution of 64 channels and more takes 1.4 to 2.5 times as long in that layout (oneDNN 3.12, AVX2), and the
    rest gains little.
    """
    wanted = config.train.memory_format
    if wanted == "auto":
        wide = max(config.model.fpn_channels, config.model.tower_channels) >= 64
        slow = device.type == "cpu" and wide and not _takes_winograd(config, device)
        wanted = "contiguous" if slow else "channels_last"
    return torch.channels_last if wanted == "channels_last" else torch.contiguous_format


def _takes_winograd(config: Config, device: torch.device) -> bool:
    return device.type == "cpu" and config.train.winograd and config.train.precision == "float32"


def default_class_names(num_classes: int) -> list[str]:
    """COCO's 80 names, or numbered ones for another count."""
    return list(COCO_CLASSES) if num_classes == len(COCO_CLASSES) else [f"class {i}" for i in range(num_classes)]


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> bool:
    """Load a state dict strictly, except that a category layer of another class count is left as it is, with a warning.

    Args:
        model: takes the weights.
        state: our names.
        source: what to call the file in messages.

    Returns:
        Whether the category layer was made anew.

    Raises:
        InputError: missing, surplus or misshapen tensors, all listed.
    """
    own = model.state_dict()
    state = dict(state)
    remade = False
    layer = "head.category_predictor"
    if f"{layer}.bias" in state and f"{layer}.bias" in own and len(state[f"{layer}.bias"]) != len(own[f"{layer}.bias"]):
        warnings.warn(
            f"{source} has {len(state[f'{layer}.bias'])} classes and the model {len(own[f'{layer}.bias'])}: "
            "the category layer starts anew, everything else is kept",
            stacklevel=2,
        )
        state |= {f"{layer}.{part}": own[f"{layer}.{part}"] for part in ("weight", "bias")}
        remade = True
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
    return remade


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


def _model_config(
    given: str | Path | Config | ModelConfig | None, content: dict[str, Any] | None, weights: str | Path | None
) -> ModelConfig:
    if isinstance(given, ModelConfig):
        return given
    if isinstance(given, Config):
        return given.model
    if given is not None:
        return load_config(given).model
    if content is not None and is_own(content) and "config" in content:
        return Config.from_checkpoint(content["config"], source=str(weights)).model
    raise InputError(
        "name a model: only checkpoints of this library carry their own configuration"
        if weights
        else "name a model or give a weights file of this library"
    )


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")


def _reason(error: BaseException) -> str:
    return " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
