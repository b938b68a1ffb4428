"""An oracle that predicts its training targets exactly: the AP or PQ that the targets themselves allow."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from solov2.models.panoptic import postprocess_panoptic
from solov2.models.postprocess import postprocess
from solov2.ops.panoptic import IGNORED
from solov2.settings import PanopticSettings, PostprocessSettings

LOGIT = 20.0  # sigmoid(20) is 1 in float32, so scores are 1 and masks equal the targets


class Oracle:
    """Predicts the training targets of a batch as a perfect network would; used like a `solov2.predict.Predictor`.

    Args:
        grid_sizes: S of each level.
        num_classes: C.
        settings: post-processing settings.
        num_stuff: number of stuff classes; above 0, the results are panoptic.
        panoptic: settings of the merge.
    """

    def __init__(
        self,
        grid_sizes: Sequence[int],
        num_classes: int,
        settings: PostprocessSettings,
        *,
        num_stuff: int = 0,
        panoptic: PanopticSettings | None = None,
    ) -> None:
        self.grid_sizes, self.num_classes, self.settings = tuple(grid_sizes), num_classes, settings
        self.num_stuff, self.panoptic = num_stuff, panoptic or PanopticSettings()
        self._launched: deque[dict[str, Any]] = deque()

    def launch(self, batch: dict[str, Any]) -> None:
        """Accept a batch with `targets`."""
        self._launched.append(batch)

    def collect(self) -> list[dict[str, Any]]:
        """The results of the oldest launched batch, with RLE masks."""
        batch = self._launched.popleft()
        targets, sizes, original_sizes = batch["targets"], batch["sizes"], batch["original_sizes"]
        raw = oracle_raw(targets, batch_size=len(sizes), grid_sizes=self.grid_sizes, num_classes=self.num_classes)
        if not self.num_stuff:
            return postprocess(raw, sizes, original_sizes, self.settings, mask_format="rle")
        raw["semantic_logits"] = oracle_semantic_logits(targets["semantic"], sizes.tolist(), self.num_stuff)
        return postprocess_panoptic(raw, sizes, original_sizes, self.settings, self.panoptic)


def oracle_raw(
    targets: Mapping[str, Any], *, batch_size: int, grid_sizes: Sequence[int], num_classes: int
) -> dict[str, Any]:
    """Encode training targets as the raw output of a perfect network.

    Each instance gets one positive cell: the first that it does not lose to a later instance, so one on the finest
    possible level, where the area filter has its lowest threshold. An instance without such a cell is lost. The mask
    features have one channel per instance of an image, and the kernel of its cell selects that channel.

    The AP of this output is an upper bound for any network, reached in training at zero loss: AP is lost only to masks
    at stride 4, shared cells, the area filter, matrix NMS and the final resize. If it is low, the grids, scale ranges
    or input size do not suit the data.

    Args:
        targets: `category` int64 [B, sum S^2] with background = num_classes; `positives` int64 [P, 3] of (image, cell
            in the concatenated levels, instance over the batch); `masks` uint8 [N, H/4, W/4].
        batch_size: B.
        grid_sizes: S of each level.
        num_classes: C.

    Returns:
        `category_logits`: list of [B,C,S,S]; `kernels`: list of [B,E,S,S]; `mask_features`: [B,E,H/4,W/4], with E the
        maximum number of instances that got a cell in an image (at least 1). float32, on the targets' device.

    Raises:
        ValueError: the targets do not fit the batch size and the grids.
    """
    category, masks = targets["category"], targets["masks"]
    num_cells = sum(size * size for size in grid_sizes)
    if category.shape != (batch_size, num_cells):
        raise ValueError(
            f"category has shape {tuple(category.shape)}, but batch_size and grid_sizes give {(batch_size, num_cells)}"
        )
    instance, flat = _own_cells(targets["positives"], len(masks), batch_size * num_cells, num_cells)
    image, cell = flat // num_cells, flat % num_cells  # ascending in `image`: instances are numbered image by image
    channel = torch.arange(len(image), device=image.device) - torch.searchsorted(image, image)
    channels = int(channel.max()) + 1 if len(channel) else 1

    logits = category.new_full((batch_size, num_cells, num_classes), -LOGIT, dtype=torch.float32)
    logits[image, cell, category[image, cell]] = LOGIT
    kernels = logits.new_zeros(batch_size, num_cells, channels)
    kernels[image, cell, channel] = 1.0
    mask_features = logits.new_full((batch_size, channels, *masks.shape[1:]), -LOGIT)
    mask_features[image, channel] = (2.0 * masks[instance] - 1.0) * LOGIT
    return {
        "category_logits": _to_levels(logits, grid_sizes),
        "kernels": _to_levels(kernels, grid_sizes),
        "mask_features": mask_features,
    }


def oracle_semantic_logits(semantic: Tensor, sizes: Sequence[Sequence[int]], num_stuff: int) -> Tensor:
    """Encode the semantic target as logits; void counts as a thing, and padding repeats the last row and column.

    Args:
        semantic: uint8 [B, h, w], stuff labels, `num_stuff` for things, 255 for void and padding.
        sizes: B pairs (height, width) of the images before padding, in input pixels.
        num_stuff: S.

    Returns:
        float32 [B, S + 1, h, w].
    """
    labels = semantic.masked_fill(semantic == IGNORED, num_stuff).long()
    for image, (height, width) in enumerate(sizes):  # the target has the pixels at 4 i + 2
        rows, columns = (
            torch.arange(padded, device=labels.device).clamp(max=(side + 1) // 4 - 1)
            for padded, side in zip(labels.shape[1:], (height, width))
        )
        labels[image] = labels[image, rows][:, columns]
    hits = labels[:, None] == torch.arange(num_stuff + 1, device=labels.device)[:, None, None]  # [B, S + 1, h, w]
    return (2.0 * hits - 1.0) * LOGIT


def _own_cells(positives: Tensor, num_instances: int, num_flat: int, num_cells: int) -> tuple[Tensor, Tensor]:
    """Instances that own a cell, ascending, and for each its first own cell, as image * num_cells + cell."""
    image, cell, instance = positives.unbind(1)
    flat = image * num_cells + cell
    owner = flat.new_full((num_flat,), -1).scatter_reduce(0, flat, instance, "amax")
    owned = owner[flat] == instance
    first = flat.new_full((num_instances,), num_flat).scatter_reduce(0, instance[owned], flat[owned], "amin")
    found = (first < num_flat).nonzero().flatten()
    return found, first[found]


def _to_levels(values: Tensor, grid_sizes: Sequence[int]) -> list[Tensor]:
    """[B, sum S^2, D] -> list of [B, D, S, S]."""
    levels = values.split([size * size for size in grid_sizes], dim=1)
    return [level.transpose(1, 2).unflatten(2, (size, size)) for level, size in zip(levels, grid_sizes, strict=True)]
