"""Foreign checkpoints by named rules.

Each family is a table of (pattern, replacement) on state-dict names; a name no rule knows is reported, never dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

RGB_MEAN, RGB_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]

# mmdetection 2.x and 3.x; the last names of convolution and norm inside a step differ from ours
MMDET_RULES = (
    (r"^backbone\.", "backbone."),
    (r"^neck\.lateral_convs\.(\d)\.conv\.", r"fpn.lateral.\1."),
    (r"^neck\.fpn_convs\.(\d)\.conv\.", r"fpn.output.\1."),
    (r"^mask_head\.cls_convs\.(\d)\.(conv|gn)\.", r"head.category_tower.\1.\2."),
    (r"^mask_head\.kernel_convs\.(\d)\.(conv|gn)\.", r"head.kernel_tower.\1.\2."),
    (r"^mask_head\.conv_cls\.", "head.category_predictor."),
    (r"^mask_head\.conv_kernel\.", "head.kernel_predictor."),
    (
        r"^mask_head\.mask_feature_head\.convs_all_levels\.(\d)\.conv(\d)\.(conv|gn)\.",
        r"mask_feature_head.levels.\1.\2.\3.",
    ),
    (r"^mask_head\.mask_feature_head\.conv_pred\.(conv|gn)\.", r"mask_feature_head.predictor.\1."),
)


def convert_state_dict(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict of another SOLOv2 implementation under our names.

    Args:
        state_dict: name -> tensor, without wrappers.

    Returns:
        (state dict, traits): traits hold family, stride_in_1x1, channel_order, pixel_mean, pixel_std, modulated.

    Raises:
        ValueError: the family is not recognised, or a name fits no rule; the sentence lists such names.
    """
    traits = {
        "family": "solov2",
        "stride_in_1x1": False,
        "channel_order": "rgb",
        "pixel_mean": RGB_MEAN,
        "pixel_std": RGB_STD,
        "modulated": True,
    }
    if any(name.startswith("head.category_predictor.") for name in state_dict):
        return dict(state_dict), traits
    if not any(name.startswith("mask_head.mask_feature_head.") for name in state_dict):
        raise ValueError(
            "the names in this file are not those of a SOLOv2 that this version converts "
            f"(first names: {', '.join(list(state_dict)[:3])})"
        )
    return _rename(state_dict, MMDET_RULES), traits | {"family": "mmdet"}


def _rename(state_dict: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    renamed, unknown = {}, []
    for name, tensor in state_dict.items():
        for pattern, replacement in rules:
            new_name, count = re.subn(pattern, replacement, name)
            if count:
                renamed[re.sub(r"\.gn\.(?=weight$|bias$)", ".norm.", new_name)] = tensor
                break
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"{len(unknown)} names fit no rule of this family, among them {', '.join(unknown[:5])}")
    return renamed
