"""Batch norms with fixed statistics, folded in training into the convolutions before them.

Such a norm is a scale and a shift per channel. Folded into weight and bias it leaves function and gradients the same,
saves one pass over memory in each direction, and the activation between the two need not be kept. On an accelerator the
many small operations of folding would take longer to launch than to run, so a stage is folded at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from solov2.models.layers import DeformConv2d

Layer: TypeAlias = tuple[Any, Any]  # a convolution and the norm after it
Folded: TypeAlias = dict[nn.Module, tuple[Tensor, Tensor]]  # convolution -> weight [C', C, k, k] and bias [C']


def conv_norm(conv: nn.Module, norm: nn.Module, x: Tensor, folded: Folded | None = None) -> Tensor:
    """norm(conv(x)), [B, C, H, W] -> [B, C', H', W'].

    Evaluation applies one after the other, which rounds as the reference does; `SOLOv2.optimize` folds permanently.

    Args:
        conv: without bias.
        norm: any norm; only a batch norm with fixed statistics is folded.
        x: the input.
        folded: from `NormFolder`; without an entry for `conv`, the norm is folded here.
    """
    if not _can_fold(conv, norm):
        return norm(conv(x))
    weight, bias = folded[conv] if folded and conv in folded else _fold_norm(conv, norm)
    if isinstance(conv, DeformConv2d):
        return conv(x, weight, bias)
    assert isinstance(conv, nn.Conv2d)
    return conv._conv_forward(x, weight, bias)


def _can_fold(conv: nn.Module, norm: nn.Module) -> bool:
    return isinstance(norm, nn.BatchNorm2d) and conv.training and not norm.training


def _fold_norm(conv: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of one layer. `torch.compile` fuses these operations by itself."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()  # [C']
    return conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale  # [C', C, k, k], [C']


class NormFolder:
    """Folds the norms of one stage in every step, or only once if the stage is frozen.

    What was folded once is used until one of its tensors is replaced, moved, cast or changed in place; changes through
    `tensor.data` cannot be seen before the next `ResNet.train`. State dicts do not have it, and copies start without.
    """

    def __init__(self) -> None:
        self._state: Any = None  # of autocast and of the tensors that `_folded` was made of
        self._sources: list[Any] = []  # kept alive, because the id of a freed object is reused
        self._folded: Folded = {}

    def __reduce__(self) -> tuple[type[NormFolder], tuple[()]]:
        return NormFolder, ()

    def __call__(self, *blocks: nn.Module) -> Folded:
        """Weights and biases for `conv_norm`; nothing in evaluation and for `torch.compile`.

        Args:
            blocks: of one stage, with children convN and bnN, and perhaps a shortcut `downsample` of one such pair.
        """
        if torch.compiler.is_compiling() or not blocks[0].training:
            return {}
        layers = [layer for block in blocks for layer in _layers_of(block) if _can_fold(*layer)]
        tensors = [
            tensor
            for conv, norm in layers
            for tensor in (conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        ]
        if torch.is_inference_mode_enabled() or any(t.requires_grad or t.is_inference() for t in tensors):
            return fold_norms(layers)
        storages = [tensor.untyped_storage() for tensor in tensors]
        state = [(id(tensor), tensor._version, storage._cdata) for tensor, storage in zip(tensors, storages)]
        half = autocast_type(tensors[0]) if tensors else None
        if (half, state) != self._state:
            self._state, self._sources, self._folded = (half, state), [tensors, storages], fold_norms(layers)
        return self._folded


def _layers_of(block: nn.Module) -> Iterator[Layer]:
    children = dict(block.named_children())
    for number in "123":
        if f"conv{number}" in children:
            yield children[f"conv{number}"], children[f"bn{number}"]
    if "downsample" in children:
        conv, norm = children["downsample"].children()
        yield conv, norm


def fold_norms(layers: Sequence[Layer]) -> Folded:
    """Fold many layers at once: ten operations, and one per convolution; a little more in the backward pass."""
    if not layers:
        return {}
    convs, norms = zip(*layers)
    sizes = [norm.num_features for norm in norms]
    variance = torch.cat(torch._foreach_add([norm.running_var for norm in norms], [norm.eps for norm in norms]))
    scale = torch.cat([norm.weight for norm in norms]) * variance.rsqrt()  # [C' of all layers]
    mean, shift = torch.cat([norm.running_mean for norm in norms]), torch.cat([norm.bias for norm in norms])
    bias = shift - mean * scale  # [C' of all layers]
    types = [conv.weight.dtype if isinstance(conv, DeformConv2d) else autocast_type(conv.weight) for conv in convs]
    biases = {dtype: bias.to(dtype).split(sizes) for dtype in {*types}}
    weights = ScaledWeights.apply(types, scale, *(conv.weight for conv in convs))
    return {conv: (weight, biases[dtype][i]) for i, (conv, weight, dtype) in enumerate(zip(convs, weights, types))}


def autocast_type(weight: Tensor) -> torch.dtype:
    """The type in which a convolution uses its weight: half precision under autocast, otherwise the weight's own."""
    device = weight.device.type
    if weight.dtype == torch.float32 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


class ScaledWeights(torch.autograd.Function):
    """(types, scale [C' of all], weights [C', C, k, k]...) -> the weights, each channel C' times its scale.

    Products are rounded to their type as they are written: without this function, autocast would cast every weight and
    every gradient in a pass of its own.
    """

    @staticmethod
    def forward(ctx: Any, types: list[torch.dtype], scale: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        """One product per weight."""
        ctx.save_for_backward(scale, *weights)
        return tuple(
            torch.mul(weight, own, out=torch.empty_like(weight, dtype=dtype))
            for dtype, weight, own in zip(types, weights, _per_weight(scale, weights))
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of scale and weights."""
        scale, *weights = ctx.saved_tensors
        _, needs_scale, *needed = ctx.needs_input_grad
        sums = [(gradient * weight).sum((1, 2, 3)) for gradient, weight in zip(gradients, weights) if needs_scale]
        return (
            None,
            torch.cat(sums) if needs_scale else None,
            *(
                gradient * own if needs else None
                for gradient, own, needs in zip(gradients, _per_weight(scale, weights), needed)
            ),
        )


def _per_weight(scale: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """[C' of all] -> [C', 1, 1, 1] of each weight."""
    return [part[:, None, None, None] for part in scale.split([len(weight) for weight in weights])]
