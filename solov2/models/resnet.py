"""ResNet and ResNeXt backbones with torchvision's layout and state-dict names (He et al. 2016, Xie et al. 2017)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from solov2.models.folding import Folded, NormFolder, conv_norm
from solov2.models.layers import DeformConv2d, recomputed


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (ResNet-18/34)."""

    expansion = 1

    def __init__(self, in_channels: int, planes: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, planes, stride)

    def forward(self, x: Tensor, folded: Folded | None = None) -> Tensor:
        """[B, C, H, W] -> [B, planes, H / stride, W / stride]."""
        out = self.relu(conv_norm(self.conv1, self.bn1, x, folded))  # [B, planes, H / stride, W / stride]
        out = conv_norm(self.conv2, self.bn2, out, folded)  # [B, planes, H / stride, W / stride]
        shortcut = x if self.downsample is None else conv_norm(self.downsample[0], self.downsample[1], x, folded)
        return self.relu(out.add_(shortcut))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 (ResNet-50 and deeper); the 3x3 may be grouped or deformable and normally carries the stride."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        planes: int,
        *,
        stride: int,
        groups: int = 1,
        group_width: int = 64,
        deformable: bool = False,
        modulated: bool = True,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        width, out_channels = planes * group_width // 64 * groups, planes * self.expansion
        first_stride, second_stride = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, width, 1, first_stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        if deformable:
            self.conv2: nn.Conv2d | DeformConv2d = DeformConv2d(
                width, width, 3, stride=second_stride, padding=1, groups=groups, modulated=modulated
            )
        else:
            self.conv2 = nn.Conv2d(width, width, 3, second_stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor, folded: Folded | None = None) -> Tensor:
        """[B, C, H, W] -> [B, 4 planes, H / stride, W / stride]."""
        out = self.relu(conv_norm(self.conv1, self.bn1, x, folded))  # [B, width, H, W], strided if stride_in_1x1
        out = self.relu(conv_norm(self.conv2, self.bn2, out, folded))  # [B, width, H / stride, W / stride]
        out = conv_norm(self.conv3, self.bn3, out, folded)  # [B, 4 planes, H / stride, W / stride]
        shortcut = x if self.downsample is None else conv_norm(self.downsample[0], self.downsample[1], x, folded)
        return self.relu(out.add_(shortcut))


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    conv = SubsampledConv2d if stride > 1 and in_channels < 16 else nn.Conv2d
    return nn.Sequential(conv(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class SubsampledConv2d(nn.Conv2d):
    """A strided 1x1 convolution that drops the unused pixels first; the same values and parameters as `nn.Conv2d`.

    With fewer than 16 input channels in channels last, the backward pass of torch's own writes beyond its memory on
    CPUs with AVX-512 (torch 2.14.1: 38 of 48 processes with 2 to 15 channels crashed, 0 of 24 with 16 to 48).
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows, columns = self.stride
        return F.conv2d(x[..., ::rows, ::columns], weight, bias)  # [B, C', H / stride, W / stride], rounded up


# name -> (block, blocks per stage, groups, width per group)
ARCHITECTURES: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int], int, int]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1), 1, 64),  # not in torchvision: for small models trained from scratch
    "resnet18": (BasicBlock, (2, 2, 2, 2), 1, 64),
    "resnet34": (BasicBlock, (3, 4, 6, 3), 1, 64),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 1, 64),
    "resnet101": (Bottleneck, (3, 4, 23, 3), 1, 64),
    "resnext101_64x4d": (Bottleneck, (3, 4, 23, 3), 64, 4),
}


class ResNet(nn.Module):
    """ResNet without its classifier: images [B, 3, H, W] -> [C2, C3, C4, C5] at strides 4, 8, 16, 32.

    Args:
        name: a key of `ARCHITECTURES`.
        width: channels of the stem; C2 has `width` (basic blocks) or 4 `width` channels, doubling per stage.
        frozen_stages: 0 trains everything, 1 freezes the stem and layer1 (the reference), n also layer2..layer n.
        frozen_batch_norm: use the running statistics in training too and never update them, as in the reference, since
            batches of large images are too small for their own; scale and shift of unfrozen stages are trained.
        deformable: make every 3x3 of layer2..layer4 deformable (bottleneck networks only).
        modulated: DCNv2 if true, DCNv1 if false.
        stride_in_1x1: put a bottleneck's stride on its first 1x1, as in MSRA's (detectron2's) weights.

    Raises:
        ValueError: unknown name, or `deformable` or `stride_in_1x1` for basic blocks.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        name: str,
        *,
        width: int = 64,
        frozen_stages: int = 1,
        frozen_batch_norm: bool = True,
        deformable: bool = False,
        modulated: bool = True,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        if name not in ARCHITECTURES:
            raise ValueError(f"backbone must be one of {', '.join(ARCHITECTURES)}, got {name!r}")
        block, depths, groups, group_width = ARCHITECTURES[name]
        if block is BasicBlock and (deformable or stride_in_1x1):
            raise ValueError(f"{name} has basic blocks, which support neither deformable stages nor stride_in_1x1")
        self.frozen_stages, self.frozen_batch_norm = frozen_stages, frozen_batch_norm
        self.recompute = False  # keep only the inputs of blocks for backward passes, which compute the rest again
        self.out_channels = [width * 2**i * block.expansion for i in range(4)]

        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        in_channels = width
        for i, depth in enumerate(depths):
            planes, blocks = width * 2**i, []
            options: dict[str, Any] = {}  # bottlenecks only
            if block is Bottleneck:
                options = {
                    "groups": groups,
                    "group_width": group_width,
                    "deformable": deformable and i > 0,
                    "modulated": modulated,
                    "stride_in_1x1": stride_in_1x1,
                }
            for j in range(depth):
                blocks.append(block(in_channels, planes, stride=2 if i and not j else 1, **options))
                in_channels = planes * block.expansion
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self._folders = [NormFolder() for _ in range(5)]  # of stem and stages
        self._initialize()
        for module in self._frozen_modules():
            module.requires_grad_(False)

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _frozen_modules(self) -> list[nn.Module]:
        stages = [getattr(self, f"layer{i}") for i in range(1, self.frozen_stages + 1)]
        return [self.conv1, self.bn1, *stages] if self.frozen_stages else []

    def train(self, mode: bool = True) -> ResNet:
        """Set the mode, but keep batch norms with fixed statistics in evaluation mode."""
        super().train(mode)
        self._folders = [NormFolder() for _ in range(5)]
        fixed = [self] if self.frozen_batch_norm else self._frozen_modules()
        for part in fixed:
            for module in part.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> [C2..C5], each [B, out_channels[i], H / s, W / s] with strides s = 4, 8, 16, 32."""
        fold_stem, *fold_stages = self._folders
        x = self.relu(conv_norm(self.conv1, self.bn1, images, fold_stem(self)))  # [B, width, H / 2, W / 2]
        x = self.maxpool(x)  # [B, width, H / 4, W / 4]
        features = []
        for stage, fold in zip((self.layer1, self.layer2, self.layer3, self.layer4), fold_stages):
            folded = fold(*stage)
            for block in stage:  # [B, out_channels[i], H / s, W / s]
                x = recomputed(block, x, folded) if self.recompute else block(x, folded)
            features.append(x)
        return features
