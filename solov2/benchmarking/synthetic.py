"""Synthetic, seeded inputs for the benchmark: samples, network outputs with objects, and batch norm statistics.

A network with random weights finds nothing. Post-processing therefore runs on synthetic outputs with the network's
shapes and dtypes, a given number of candidates, and ellipses as masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solov2.ops.masks import masks_to_boxes

OBJECTS = 32  # distinct masks per image, shared by its candidates as by the cells around one object
LOGIT = 8.0  # magnitude of mask logits well inside or outside an ellipse, and of semantic logits
REGIONS = (4, 6)  # rows and columns of stuff per image


def ellipses(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Random ellipses, float32 [count, height, width]: 1 at the center, 0 on the border, negative outside."""
    center_x, center_y = 0.1 + 0.8 * torch.rand(2, count, 1, 1, generator=generator)
    radius_x, radius_y = 0.04 + 0.21 * torch.rand(2, count, 1, 1, generator=generator)
    x, y = (torch.arange(width) + 0.5) / width, ((torch.arange(height) + 0.5) / height)[:, None]
    return 1 - ((x - center_x) / radius_x) ** 2 - ((y - center_y) / radius_y) ** 2


def synthetic_sample(count: int, size: tuple[int, int], num_classes: int, generator: torch.Generator) -> dict[str, Any]:
    """A training sample (see `solov2.data.coco`): noise, with `count` ellipses as instances."""
    masks = (ellipses(count, *size, generator) > 0).to(torch.uint8)
    boxes = masks_to_boxes(masks)
    return {
        "image": torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator),
        "boxes": boxes,
        "labels": torch.randint(num_classes, (count,), generator=generator),
        "masks": masks,
        "image_id": 0,
        "original_size": size,
    }


def synthetic_raw(raw: dict[str, Any], candidates: int, generator: torch.Generator) -> dict[str, Any]:
    """Network outputs with the shapes, dtypes and layout of `raw`, and with objects in every image.

    The first `OBJECTS` mask features are ellipses, every cell's kernel selects one of them, and `candidates` random
    cells have scores between 0.15 and 0.95 in the class of their object. Points NMS removes direct neighbors of these.
    Semantic logits, if there are any, form regions of random classes.
    """
    batch, channels, height, width = raw["mask_features"].shape
    objects, num_classes = min(OBJECTS, channels), raw["category_logits"][0].shape[1]
    cells = [level.shape[2:].numel() for level in raw["kernels"]]
    features = torch.zeros(batch, channels, height, width)
    drawn = LOGIT * ellipses(batch * objects, height, width, generator).clamp(-1, 1)
    features[:, :objects] = drawn.view(batch, objects, height, width)
    owner = torch.randint(objects, (batch, sum(cells)), generator=generator)
    labels = torch.randint(num_classes, (batch, objects), generator=generator).gather(1, owner)
    chosen = torch.rand(owner.shape, generator=generator).argsort(1).argsort(1) < candidates
    scores = 0.15 + 0.8 * torch.rand(owner.shape, generator=generator)
    own_logits = torch.where(chosen, scores.logit(), -LOGIT)
    logits = torch.full((batch, sum(cells), num_classes), -LOGIT).scatter(2, labels[..., None], own_logits[..., None])

    def like(values: Tensor, originals: Sequence[Tensor]) -> list[Tensor]:
        levels = zip(originals, values.mT.split(cells, dim=2), strict=True)
        return [torch.empty_like(original).copy_(level.view_as(original)) for original, level in levels]

    synthetic: dict[str, Any] = {
        "category_logits": like(logits, raw["category_logits"]),
        "kernels": like(F.one_hot(owner, channels).float(), raw["kernels"]),
        "mask_features": torch.empty_like(raw["mask_features"]).copy_(features),
    }
    if (semantic := raw.get("semantic_logits")) is not None:
        regions = LOGIT * torch.randn(*semantic.shape[:2], *REGIONS, generator=generator)
        regions = F.interpolate(regions, (height, width), mode="bilinear")
        synthetic["semantic_logits"] = torch.empty_like(semantic).copy_(regions)
    return synthetic


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor) -> None:
    """Set all batch norm statistics to those of `images`; otherwise, random weights make activations overflow fp16."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = 1.0
    model(images)
    for norm in norms:
        norm.eval().momentum = 0.1
