"""COCO's categories, and how two lists of class names differ."""

from __future__ import annotations

from collections.abc import Sequence

# COCO numbered 91 categories and annotated 80 of them.
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
    """COCO's 80 names, or numbered ones for another count."""
    return list(COCO_CLASSES) if num_classes == len(COCO_CLASSES) else [f"class {i}" for i in range(num_classes)]


def default_category_ids(class_names: Sequence[str]) -> list[int]:
    """COCO's ids for COCO's classes, else label + 1."""
    if list(class_names) == list(COCO_CLASSES):
        return list(COCO_CATEGORY_IDS)
    return list(range(1, len(class_names) + 1))


def class_difference(first: Sequence[str], second: Sequence[str]) -> str:
    """The first names that only one of two class lists has."""
    odd = sorted(set(first) ^ set(second))
    return ", ".join(odd[:5]) if odd else "the same names under other ids"
