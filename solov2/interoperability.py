"""Convert results to objects of other libraries; docs/interoperability.md lists those that accept results directly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from solov2.errors import InputError
from solov2.ops.masks import decode_rle

if TYPE_CHECKING:
    import supervision


def to_supervision(result: Mapping[str, Any], class_names: Sequence[str] | None = None) -> supervision.Detections:
    """Convert one result to `supervision.Detections`, for the annotators, trackers and zones of that library.

    Args:
        result: one entry of what `SOLOv2.predict` returns, on any device: scores float32 [N], labels int64 [N], boxes
            float32 [N, 4], and masks, bool [N, H, W] or N RLEs.
        class_names: name of each label, usually `SOLOv2.class_names`; None leaves `data` without names.

    Returns:
        xyxy float32 [N, 4] (maximum exclusive), confidence float32 [N], class_id int64 [N], data["class_name"] str [N],
        and mask bool [N, H, W], decoded from RLEs if necessary; mask is None for an empty list of RLEs, which has no
        image size. The arrays are on the host.

    Raises:
        InputError: supervision is not installed, or a label has no name.
    """
    try:
        import supervision
    except ImportError as error:
        raise InputError("to_supervision needs an additional package: pip install supervision") from error
    masks, labels = result["masks"], result["labels"].cpu().numpy()
    if not isinstance(masks, Tensor):
        masks = torch.stack([decode_rle(rle) for rle in masks]).bool() if masks else None
    if class_names is not None and max(labels, default=-1) >= len(class_names):
        raise InputError(f"label {max(labels)} has no name: there are {len(class_names)} class names")
    return supervision.Detections(
        xyxy=result["boxes"].cpu().numpy(),
        mask=None if masks is None else masks.cpu().numpy(),
        confidence=result["scores"].cpu().numpy(),
        class_id=labels,
        data={} if class_names is None else {"class_name": np.array(class_names, dtype=np.str_)[labels]},
    )
