"""Focal loss on the categories and dice loss on the masks (Wang et al. 2020, section 2.1.4, equation 2).

The formulas are those of SOLO (arXiv 1912.04488, "Loss Function"). Panoptic models, and instance models with an
auxiliary loss, add the cross entropy of Panoptic FPN (arXiv 1901.02446).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solov2.ops.panoptic import IGNORED

DICE_EPSILON = 1e-3  # on each of the two squared sums, as in the reference
COUNT_EPSILON = torch.finfo(torch.float32).eps  # mmdetection's guard against a zero divisor of the focal loss


class SOLOv2Criterion(nn.Module):
    """Compute the weighted losses from raw outputs and targets, without synchronizing with the host.

    loss_category = sum of the sigmoid focal loss over all cells and classes / (positive cells + 1).

    loss_mask = mask_weight * sum of the dice loss over (cell, instance) pairs / positive cells. In the divisor, a cell
    that several instances share counts once, as in mmdetection; the authors' code divides by the number of pairs, which
    differs only if there are such cells.

    loss_semantic, if the targets have a semantic map, = semantic_weight * sum of the cross entropy over all pixels that
    are not void / number of these pixels, as in Panoptic FPN; mmdetection divides by the number of all pixels.

    Half-precision inputs are computed in float32. Without a positive cell, loss_mask is a zero connected to the graph
    (DistributedDataParallel needs every gradient); so is loss_semantic if all pixels are void.

    Args:
        num_classes: C.
        mask_weight: lambda, the weight of the mask loss (the category loss has weight 1).
        focal_gamma, focal_alpha: parameters of the focal loss (Lin et al. 2017, arXiv 1708.02002).
        semantic_weight: weight of the semantic loss.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        mask_weight: float = 3.0,
        focal_gamma: float = 2.0,
        focal_alpha: float = 0.25,
        semantic_weight: float = 0.5,
    ) -> None:
        super().__init__()
        self.num_classes, self.mask_weight, self.semantic_weight = num_classes, mask_weight, semantic_weight
        self.focal_gamma, self.focal_alpha = focal_gamma, focal_alpha

    def forward(
        self,
        raw: dict[str, Any],
        targets: dict[str, Any],
        num_positives: Tensor | float | None = None,
        num_labeled: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """Losses of a batch, already weighted: the caller only sums them.

        Args:
            raw: category_logits list of [B, C, S, S], kernels list of [B, E, S, S], mask_features [B, E, H / 4, W / 4];
                if the targets have a semantic map, also semantic_logits [B, channels, H / 4, W / 4].
            targets: from `TargetAssigner`, on the same device.
            num_positives: number of positive cells to normalize by, e.g. that of all accumulated batches or of all
                processes; default: that of this batch.
            num_labeled: the same for the pixels of the semantic map that are not void.

        Returns:
            {"loss_category", "loss_mask"}, and "loss_semantic" if the targets have a semantic map: scalars in at least
            float32.
        """
        category: Tensor = targets["category"]  # [B, cells]
        with torch.autocast(category.device.type, enabled=False):
            logits = torch.cat([level.flatten(2) for level in raw["category_logits"]], dim=2)  # [B, C, cells]
            focal = self._focal(_widen(logits), category)  # []
            dice = self._dice(raw["kernels"], _widen(raw["mask_features"]), targets)  # []
        if num_positives is None:
            num_positives = (category < self.num_classes).sum()  # every positive cell has exactly one category
        positives = _divisor(num_positives, focal)  # []
        losses = {
            "loss_category": focal / (positives + 1 + COUNT_EPSILON),
            "loss_mask": self.mask_weight * dice / positives.clamp(min=1),
        }
        if "semantic" in targets:
            semantic: Tensor = targets["semantic"]  # [B, h, w]
            entropy = _cross_entropy(_widen(raw["semantic_logits"]), semantic)  # []
            labeled = _divisor((semantic != IGNORED).sum() if num_labeled is None else num_labeled, entropy)  # []
            losses["loss_semantic"] = self.semantic_weight * entropy / labeled.clamp(min=1)
        return losses

    def _focal(self, logits: Tensor, category: Tensor) -> Tensor:
        """Sum of the sigmoid focal loss (Lin et al. 2017); logits [B, C, cells], category [B, cells]."""
        positive = category[:, None] == torch.arange(self.num_classes, device=category.device)[:, None]  # [B, C, cells]
        # With z = logit where positive, else -logit: 1 - p_t is sigmoid(-z), the cross entropy softplus(-z).
        signed = torch.where(positive, -logits, logits)  # [B, C, cells], -z
        weight = torch.where(positive, self.focal_alpha, 1 - self.focal_alpha)  # [B, C, cells]
        cross_entropy = F.softplus(signed, threshold=40)  # [B, C, cells]; the default, 20, is exact in float32 only
        return (weight * signed.sigmoid() ** self.focal_gamma * cross_entropy).sum()  # []

    def _dice(self, kernels: list[Tensor], features: Tensor, targets: dict[str, Any]) -> Tensor:
        """Sum over (cell, instance) pairs of 1 - 2 sum(p t) / (sum(p^2) + sum(t^2)), over the whole padded map.

        Only the kernels of positive cells are applied (section 2.1): all cells' masks would take 1 GB per image.
        """
        flat_kernels = torch.cat([level.flatten(2) for level in kernels], dim=2).transpose(1, 2)  # [B, cells, E]
        image, cell, instance = targets["positives"].unbind(1)  # [P] each
        # One index into flattened rows: its backward pass is deterministic, that of two index tensors is not on a CPU.
        chosen = flat_kernels.flatten(0, 1).index_select(0, image * flat_kernels.shape[1] + cell)  # [P, E]
        pairs, instances = _counts_per_image(targets)
        total = features.new_zeros(())
        first = 0
        for own_kernels, own_masks, own_instance, feature in zip(
            chosen.split(pairs),
            targets["masks"].flatten(1).split(instances),
            instance.split(pairs),
            features,
            strict=True,
        ):
            # The dynamic convolution (equation 1) as one matrix product, [P_i, E] x [E, h w].
            probability = (own_kernels.to(feature.dtype) @ feature.flatten(1)).sigmoid()  # [P_i, h w]
            truth = own_masks.to(probability.dtype)  # [N_i, h w], one mask per instance
            own_instance = own_instance - first  # [P_i], into own_masks
            # One product with all instances: a copy of the mask per pair would take several times the memory.
            overlap = (probability @ truth.T).gather(1, own_instance[:, None])[:, 0]  # [P_i]
            area = truth.sum(1, dtype=torch.float32).index_select(0, own_instance)  # [P_i], float32 in the reference
            squares = probability.square().sum(1)  # [P_i]
            total = total + (1 - 2 * overlap / ((squares + DICE_EPSILON) + (area + DICE_EPSILON))).sum()
            first += len(own_masks)
        return total


def _counts_per_image(targets: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Numbers of (pairs, instances) of each image, on the host.

    `TargetAssigner` returns both; where a caller left them out, they are counted from the triples, which synchronizes
    with an accelerator.
    """
    if "positives_per_image" in targets:
        return targets["positives_per_image"], targets["instances_per_image"]
    image, _, instance = targets["positives"].unbind(1)
    pairs = torch.bincount(image, minlength=len(targets["category"])).tolist()
    ends, end = [], 0
    for own in instance.split(pairs):
        end = max([end, *(own + 1).tolist()])
        ends.append(end)
    ends[-1] = len(targets["masks"])
    return pairs, [end - start for start, end in zip([0, *ends], ends)]


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the softmax cross entropy over the pixels that are not void; logits [B, channels, h, w], labels [B, h, w].

    Pixels are flattened because the loss of a map has no deterministic form on an accelerator.
    """
    rows = logits.movedim(1, -1).flatten(0, 2)  # [B h w, channels]
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(rows, labels.flatten().long(), ignore_index=IGNORED, reduction="none").sum()  # []


def _divisor(count: Tensor | float, loss: Tensor) -> Tensor:
    """A count in the dtype of a loss: int64 plus a float epsilon would be float32."""
    if isinstance(count, Tensor):
        return count.to(loss.dtype)
    return loss.new_full((), count)  # filled on the device: copying from the host would synchronize


def _widen(x: Tensor) -> Tensor:
    """Promote half precision to float32; float32 and float64 stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
