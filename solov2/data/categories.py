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

# Of the 91 ids after those of the things, the panoptic task of 2018 keeps 36 and merges others into 17.
COCO_STUFF_IDS = tuple(
    int(number)
    for number in (
        "92 93 95 100 107 109 112 118 119 122 125 128 130 133 138 141 144 145 147 148 149 151 154 155 156 159 161 166 "
        "168 171 175 176 177 178 180 181 184 185 186 187 188 189 190 191 192 193 194 195 196 197 198 199 200"
    ).split()
)
COCO_STUFF = tuple(
    (
        "banner|blanket|bridge|cardboard|counter|curtain|door-stuff|floor-wood|flower|fruit|gravel|house|light|"
        "mirror-stuff|net|pillow|platform|playingfield|railroad|river|road|roof|sand|sea|shelf|snow|stairs|tent|towel|"
        "wall-brick|wall-stone|wall-tile|wall-wood|water-other|window-blind|window-other|tree-merged|fence-merged|"
        "ceiling-merged|sky-other-merged|cabinet-merged|table-merged|floor-other-merged|pavement-merged|"
        "mountain-merged|grass-merged|dirt-merged|paper-merged|food-other-merged|building-other-merged|rock-merged|"
        "wall-other-merged|rug-merged"
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


def default_stuff_names(num_stuff: int) -> list[str]:
    """COCO's names for 53 stuff classes, otherwise numbered ones."""
    return list(COCO_STUFF) if num_stuff == len(COCO_STUFF) else [f"stuff {i}" for i in range(num_stuff)]


def default_stuff_category_ids(stuff_names: Sequence[str], category_ids: Sequence[int]) -> list[int]:
    """COCO's ids for COCO's stuff, otherwise those after the ids of the classes."""
    if list(stuff_names) == list(COCO_STUFF):
        return list(COCO_STUFF_IDS)
    first = max(category_ids) + 1
    return list(range(first, first + len(stuff_names)))
