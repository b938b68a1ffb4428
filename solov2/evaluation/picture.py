"""The picture at the end of a run: ground truth beside predictions."""

from __future__ import annotations

from PIL import Image

from solov2.data.coco import CocoInstances
from solov2.models.solov2 import SOLOv2
from solov2.ops.images import read_image
from solov2.visualize import contact_sheet, draw_instances


def draw_predictions(model: SOLOv2, validation: CocoInstances, *, count: int, score_threshold: float) -> Image.Image:
    """Ground truth beside predictions for the first `count` validation images that hold instances, as one sheet."""
    labels = {category: label for label, category in enumerate(validation.category_ids)}
    rows: list[tuple[Image.Image, Image.Image]] = []
    for image_id in validation.image_ids:
        if len(rows) == count:
            break
        entries = [a for a in validation.coco.imgToAnns[image_id] if not a["iscrowd"] and a["category_id"] in labels]
        if not entries:
            continue
        image = read_image(validation.image_root / validation.coco.imgs[image_id]["file_name"], apply_exif=False)
        truth = {
            "labels": [labels[a["category_id"]] for a in entries],
            "masks": [validation.coco.annToRLE(a) for a in entries],
        }
        scale = max(1, 512 // max(image.shape[1:]))
        known, predicted = (
            draw_instances(image, result, model.class_names, score_threshold=score_threshold, scale=scale)
            for result in (truth, model.predict([image])[0])
        )
        rows.append((known, predicted))
    return contact_sheet(rows)
