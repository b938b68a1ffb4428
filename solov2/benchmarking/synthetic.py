"""Synthetic, seeded inputs of the benchmark: ground truth, network outputs with objects in them, batch norm statistics.

A random network finds nothing; decoding therefore works on prepared outputs of the network's own shapes and types that
hold a wanted number of candidates and ellipses as masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from solov2.ops.masks import masks_to_boxes

OBJECTS = 32  # different masks that the candidates of an image share, as the cells around one object do
LOGIT = 8.0  # of mask pixels well inside or outside an ellipse


def ellipses(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Random ellipses as float [count, height, width]: 1 in the centre, 0 on the border, negative outside."""
    center_x, center_y = 0.1 + 0.8 * torch.rand(2, count, 1, 1, generator=generator)
    radius_x, radius_y = 0.04 + 0.21 * torch.rand(2, count, 1, 1, generator=generator)
    x, y = (torch.arange(width) + 0.5) / width, ((torch.arange(height) + 0.5) / height)[:, None]
    return 1 - ((x - center_x) / radius_x) ** 2 - ((y - center_y) / radius_y) ** 2


def synthetic_instances(
    count: int, size: tuple[int, int], num_classes: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Ground truth of one image: boxes float32 [N, 4], labels int64 [N], masks uint8 [N, H, W]."""
    masks = (ellipses(count, *size, generator) > 0).to(torch.uint8)
    return {
        "boxes": masks_to_boxes(masks),
        "masks": masks,
        "labels": torch.randint(num_classes, (count,), generator=generator),
    }


def synthetic_raw(raw: dict[str, Any], candidates: int, generator: torch.Generator) -> dict[str, Any]:
    """Network outputs of the same shapes, types and layout as `raw` in which every image holds objects.

    The first `OBJECTS` mask features are ellipses, every cell's kernel selects one of them, and `candidates` random
    cells score between 0.15 and 0.95 in the class of their object. Points NMS removes those that are direct neighbours.
    """
    features = torch.zeros(raw["mask_features"].shape)
    objects = min(OBJECTS, features.shape[1])
    height, width = features.shape[-2:]
    grids = [level.shape[-1] for level in raw["kernels"]]
    num_cells, num_classes = sum(size**2 for size in grids), raw["category_logits"][0].shape[1]
    logits = torch.full((len(features), num_cells, num_classes), -LOGIT)
    kernels = torch.zeros(len(features), num_cells, features.shape[1])
    for image in range(len(features)):
        drawn = LOGIT * ellipses(objects, height, width, generator)
        features[image, :objects] = drawn.clamp(-LOGIT, LOGIT)
        owner = torch.randint(objects, (num_cells,), generator=generator)
        kernels[image, torch.arange(num_cells), owner] = 1
        labels = torch.randint(num_classes, (objects,), generator=generator)
        cells = torch.randperm(num_cells, generator=generator)[:candidates]
        scores = 0.15 + 0.8 * torch.rand(len(cells), generator=generator)
        logits[image, cells, labels[owner[cells]]] = scores.logit()

    def like(values: Tensor, originals: Sequence[Tensor]) -> list[Tensor]:
        levels = values.split([size**2 for size in grids], dim=1)
        return [
            torch.empty_like(original).copy_(level.mT.unflatten(2, (size, size)))
            for level, original, size in zip(levels, originals, grids, strict=True)
        ]

    return {
        "category_logits": like(logits, raw["category_logits"]),
        "kernels": like(kernels, raw["kernels"]),
        "mask_features": torch.empty_like(raw["mask_features"]).copy_(features),
    }


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor) -> None:
    """Give all batch norms the statistics of `images`; else activations of random weights would grow past fp16."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum
