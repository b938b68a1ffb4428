"""Prediction, shared by `SOLOv2.predict`, the predict command, evaluation and the benchmark."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from solov2.compute import Compute, SideStream


class Predictor:
    """Predicts batches with one model in two steps that may overlap: `launch` queues the network for a batch, and
    `collect` returns the results of the oldest batch launched.

    Args:
        model: a `SOLOv2`, used only through its `normalize`, `forward` and `postprocess`; put into evaluation mode.
        compute: device, precision and layout; the model must already be on the device.
        mask_format: "bool" for full-size masks, "rle" for COCO RLEs.
        score_threshold, max_instances: post-processing limits; None keeps the model's own.
    """

    def __init__(
        self,
        model: Any,
        compute: Compute,
        *,
        mask_format: str = "rle",
        score_threshold: float | None = None,
        max_instances: int | None = None,
    ) -> None:
        self.model, self.compute, self.mask_format = model.eval(), compute, mask_format
        limits = {"score_threshold": score_threshold, "max_instances": max_instances}
        self.settings = {name: value for name, value in limits.items() if value is not None}
        self._side = SideStream(compute.device)  # masks of one batch beside the network of the next
        self._launched: deque[tuple[dict[str, Any], torch.Event | None, Tensor, Tensor]] = deque()

    @torch.no_grad()
    def launch(self, batch: Mapping[str, Any]) -> None:
        """Run the network on a batch; on an accelerator this only queues it.

        Args:
            batch: pixels uint8 [B, 3, H, W], sizes int64 [B, 2] and original_sizes int64 [B, 2], on the host.
        """
        moved = self.compute.move({"pixels": batch["pixels"], "sizes": batch["sizes"]})
        images = self.compute.images(self.model, moved)  # float32 [B, 3, H, W]
        with self.compute.arithmetic(), self.compute.autocast():
            raw = self.model(images)
        # Sizes stay on the host, which must not wait for them.
        self._launched.append((raw, self._side.mark(), batch["sizes"], batch["original_sizes"]))

    @torch.no_grad()  # gradient mode is per thread, and this may run in another one
    def collect(self) -> list[dict[str, Any]]:
        """Results of the oldest launched batch, one per image, see `solov2.models.postprocess.postprocess`."""
        raw, mark, *both_sizes = self._launched.popleft()
        with self._side.after(mark, _tensors(raw)), self.compute.arithmetic():
            results = self.model.postprocess(raw, *both_sizes, mask_format=self.mask_format, **self.settings)
        self._side.hand_over(_tensors(results))
        return results


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
