"""Break a copy of a COCO dataset: plant one fault of each kind that `solov2 check-data` reports, and list them.

    python tests/scripts/break_photos.py ANNOTATIONS IMAGES OUT

Writes OUT/instances.json, OUT/images/ and OUT/planted.json: [[kind, image id, annotation id], ...].
`solov2 check-data OUT/instances.json --images OUT/images` must then find these faults and no others.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pycocotools.mask as coco_mask
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from solov2.ops.masks import segmentation_to_rle  # noqa: E402

Planted = tuple[str, int | None, int | None]


def rewrite(path: Path, change: Callable[[Image.Image], Image.Image], **options) -> None:
    with Image.open(path) as image:
        changed = change(image.convert("RGB"))
    changed.save(path, **{"format": "JPEG", **options})


def rotation() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 8
    return exif


def bomb(path: Path) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)))


def deep(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.array(image.convert("L")).astype(np.uint16) * 257)


FILE_FAULTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing": (Path.unlink, ("missing file",)),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), ("unreadable file",)),
    "empty": (lambda path: path.write_bytes(b""), ("unreadable file",)),
    "text": (lambda path: path.write_text("<html>not found</html>"), ("unreadable file",)),
    "bomb": (bomb, ("unreadable file",)),
    "half the size": (lambda path: rewrite(path, lambda image: image.reduce(2)), ("wrong size",)),
    "gray": (lambda path: rewrite(path, lambda image: image.convert("L")), ("gray",)),
    "CMYK": (lambda path: rewrite(path, lambda image: image.convert("CMYK")), ("CMYK",)),
    "16 bit": (lambda path: rewrite(path, deep, format="PNG"), ("16 bit",)),
    "alpha": (lambda path: rewrite(path, lambda image: image.convert("RGBA"), format="PNG"), ("alpha",)),
    "rotated": (lambda path: rewrite(path, lambda image: image, exif=rotation()), ("EXIF rotation",)),
    "rotated, size of the viewer": (
        lambda path: rewrite(path, lambda image: image.transpose(Image.Transpose.ROTATE_90), exif=rotation()),
        ("wrong size", "EXIF rotation"),
    ),
}


def rle_of(annotation: dict, image: dict) -> dict:
    return segmentation_to_rle(annotation["segmentation"], (image["height"], image["width"]))


def uncompressed(annotation: dict, image: dict) -> dict:
    flat = coco_mask.decode(rle_of(annotation, image)).flatten(order="F")
    borders = np.flatnonzero(np.diff(np.concatenate(([0], flat)))).tolist()
    counts = np.diff([0, *borders, len(flat)]).tolist()
    return {"size": [image["height"], image["width"]], "counts": counts}


def nearly(annotation: dict, image: dict) -> dict:
    """The annotation without the first hundredth of its mask pixels, with matching box and area."""
    mask = coco_mask.decode(rle_of(annotation, image))
    set_pixels = np.argwhere(mask)
    for row, column in set_pixels[: max(1, len(set_pixels) // 100)]:
        mask[row, column] = 0
    rle = coco_mask.encode(np.asfortranarray(mask))
    box, area = coco_mask.toBbox(rle).tolist(), int(coco_mask.area(rle))
    rle["counts"] = rle["counts"].decode()
    return {**copy.deepcopy(annotation), "segmentation": rle, "bbox": box, "area": area}


# Each function changes an annotation in place, given its image.
ANNOTATION_FAULTS: dict[str, tuple[Callable[[dict, dict], object], str]] = {
    "polygon of 4 numbers": (lambda a, i: a.update(segmentation=[[1, 2, 3, 4]]), "segmentation"),
    "polygon of 2 points": (lambda a, i: a.update(segmentation=[[1, 2, 3, 4], [5, 6]]), "segmentation"),
    "odd polygon": (lambda a, i: a["segmentation"][0].append(1.0), "segmentation"),
    "RLE turned": (
        lambda a, i: a.update(segmentation={"size": [i["width"], i["height"]], "counts": [i["width"] * i["height"]]}),
        "segmentation",
    ),
    "RLE too short": (
        lambda a, i: a.update(segmentation={"size": [i["height"], i["width"]], "counts": [7]}), "segmentation",
    ),
    "short polygon": (lambda a, i: a["segmentation"].append([1, 2, 3, 4]), "short polygon"),
    "uncompressed RLE": (lambda a, i: a.update(segmentation=uncompressed(a, i)), "uncompressed RLE"),
    "crowd RLE": (lambda a, i: a.update(segmentation=uncompressed(a, i), iscrowd=1), "crowd"),
    "mask outside": (
        lambda a, i: a.update(segmentation=[[i["width"] + 9, 1, i["width"] + 20, 1, i["width"] + 20, 9]]), "empty mask",
    ),
    "unknown category": (lambda a, i: a.update(category_id=4321), "unknown category"),
    "category text": (lambda a, i: a.update(category_id=str(a["category_id"])), "category id"),
    "area 0": (lambda a, i: a.update(area=0), "left out"),
    "area missing": (lambda a, i: a.pop("area"), "area"),
    "area of the box": (lambda a, i: a.update(area=10 * a["area"]), "area differs"),
    "box NaN": (lambda a, i: a.update(bbox=[float("nan")] * 4), "box"),
    "box of half the width": (lambda a, i: a["bbox"].__setitem__(2, a["bbox"][2] / 2), "box differs"),
    "box beyond": (lambda a, i: a["bbox"].__setitem__(2, 2 * i["width"]), "box beyond image"),
    "iscrowd text": (lambda a, i: a.update(iscrowd="no"), "iscrowd"),
    "no id": (lambda a, i: a.pop("id"), "no id"),
}  # fmt: skip


def plant(content: dict, images: Path) -> tuple[dict, list[Planted]]:
    """Break files in the folder `images` in place; return a broken copy of the annotations and the list of faults.

    No image has both an image fault and an annotation fault. Only annotations of the most common class are broken, so
    that every class keeps instances.
    """
    content, planted = copy.deepcopy(content), []
    entries = {image["id"]: image for image in content["images"]}
    instances = [a for a in content["annotations"] if not a["iscrowd"] and isinstance(a["segmentation"], list)]
    free_images = [image for image in content["images"] if image["width"] >= 64]
    for change, kinds in FILE_FAULTS.values():
        image = free_images.pop()
        change(images / image["file_name"])
        planted += [(kind, image["id"], None) for kind in kinds]
    outside, size, twice = free_images.pop(), free_images.pop(), free_images.pop()
    outside["file_name"] = f"../../{outside['file_name']}"
    size["height"] = 0
    planted += [("file outside", outside["id"], None), ("size", size["id"], None)]
    untouched = {image["id"] for image in [*free_images, twice]}
    [(common, _)] = Counter(a["category_id"] for a in instances).most_common(1)
    pool = [
        a
        for a in instances
        if a["image_id"] in untouched and a["category_id"] == common and a["bbox"][2] > 24 and a["bbox"][3] > 24
    ]
    kept, pool = pool[:3], pool[3:]
    for change, kind in ANNOTATION_FAULTS.values():
        annotation = pool.pop()
        image_id, annotation_id = annotation["image_id"], annotation["id"]
        change(annotation, entries[image_id])
        planted.append((kind, image_id, None if kind == "no id" else annotation_id))
    planted += list(plant_entries(content, kept, pool, twice, entries))
    return content, planted


def plant_entries(
    content: dict, kept: list[dict], pool: list[dict], twice: dict, entries: dict[int, dict]
) -> Iterator[Planted]:
    """Plant faults that involve several entries: duplicate ids, files and instances, and categories."""
    orphan, renamed = pool.pop(), pool.pop()
    orphan["image_id"] = 10**9
    yield "unknown image", 10**9, orphan["id"]
    renamed["id"] = content["annotations"][0]["id"]
    yield "id twice", renamed["image_id"], renamed["id"]
    image = entries[kept[1]["image_id"]]
    for number, (copied, kind) in enumerate(
        [(copy.deepcopy(kept[0]), "annotation twice"), (nearly(kept[1], image), "near duplicate")]
    ):
        copied["id"] = 10**12 + number
        content["annotations"].append(copied)
        yield kind, copied["image_id"], copied["id"]
    content["images"].append({**twice, "id": 10**8})
    yield "file twice", 10**8, None
    yield "no instance", 10**8, None
    content["categories"] += [{"id": 5001, "name": "never seen"}, {"id": 5002, "name": "never seen"}, {"id": 5003}]
    yield from (("unused category", None, None), ("unused category", None, None), ("category name twice", None, None))
    yield "category name", None, None


def break_data(annotations: Path, images: Path, out: Path) -> list[Planted]:
    """Write the broken copy and the list of its faults to `out`, a folder that must not exist yet."""
    shutil.copytree(images, out / "images")
    content, planted = plant(json.loads(annotations.read_text()), out / "images")
    (out / "instances.json").write_text(json.dumps(content))
    (out / "planted.json").write_text(json.dumps(planted, indent=1))
    return planted


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("annotations", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    missing = next((path for path in (args.annotations, args.images) if not path.exists()), None)
    if missing is not None:
        parser.error(f"{missing} does not exist; expected an annotation file and its image folder")
    print(f"{len(break_data(args.annotations, args.images, args.out))} faults planted in {args.out}")
