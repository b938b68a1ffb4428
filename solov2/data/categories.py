"""COCO's categories."""

from __future__ import annotations

from collections.abc import Sequence

# COCO defined 91 category ids, but annotates only 80 of them.
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


def default_class_names(num_classes: int) -> list[str]:
    """COCO's names for 80 classes, otherwise numbered ones."""
    return list(COCO_CLASSES) if num_classes == len(COCO_CLASSES) else [f"class {i}" for i in range(num_classes)]


def default_category_ids(class_names: Sequence[str]) -> list[int]:
    """COCO's ids for COCO's classes, otherwise label + 1."""
    if list(class_names) == list(COCO_CLASSES):
        return list(COCO_CATEGORY_IDS)
    return list(range(1, len(class_names) + 1))
