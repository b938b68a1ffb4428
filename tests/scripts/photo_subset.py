"""Write a COCO annotation file, of instances or panoptic, with the first images by id that have 3 to 12 instances.

python tests/scripts/photo_subset.py ANNOTATIONS OUT [--count 8]
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path


def subset(content: dict, count: int, minimum: int = 3, maximum: int = 12) -> dict:
    """Keep the first `count` images by id with `minimum` to `maximum` instances, not counting crowds."""
    things = {category["id"] for category in content["categories"] if category.get("isthing", 1)}
    instances = Counter(
        annotation["image_id"]
        for annotation in content["annotations"]
        for entry in annotation.get("segments_info", [annotation])
        if not entry["iscrowd"] and entry["category_id"] in things
    )
    chosen = sorted(image["id"] for image in content["images"] if minimum <= instances[image["id"]] <= maximum)[:count]
    return {
        **content,
        "images": [image for image in content["images"] if image["id"] in chosen],
        "annotations": [a for a in content["annotations"] if a["image_id"] in chosen],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("annotations", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=8)
    args = parser.parse_args()
    if not args.annotations.is_file():
        parser.error(f"annotation file {args.annotations} does not exist")
    args.out.write_text(json.dumps(subset(json.loads(args.annotations.read_text()), args.count)))
