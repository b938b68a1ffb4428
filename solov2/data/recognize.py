"""Recognize annotations of other tools and formats, so that a message can say what a file or folder is.

Training reads COCO's formats only; `solov2 import` converts others.
"""

from __future__ import annotations

import itertools
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from solov2.ops.image_files import image_suffixes

ARCHIVE_SUFFIXES = (".zip", ".gz", ".tar", ".tgz", ".7z", ".rar")
PACKED = {b"\x1f\x8b": "compressed (gzip)", b"PK\x03\x04": "a ZIP archive", b"BZh": "compressed (bzip2)",
          b"\xfd7zXZ": "compressed (xz)", b"\x28\xb5\x2f\xfd": "compressed (zstd)"}  # fmt: skip
MAX_FILES = 20_000  # of a folder that are looked at
MAX_OPENED = 50  # JSON files of a folder whose beginning is read
HEAD_BYTES = 2**16
IMPORT = "convert it with solov2 import"
_COCO_LIST = re.compile(rb'"(images|annotations|categories)"\s*:\s*\[')


def describe_bytes(data: bytes) -> str | None:
    """What the content of a file that is not JSON is, as a predicate ("is ..."), or None if it is unknown."""
    for magic, what in PACKED.items():
        if data.startswith(magic):
            return f"is {what}; unpack it first"
    if data.lstrip()[:1] == b"<":
        return "is XML, as in Pascal VOC and CVAT, not JSON; solov2 import converts CVAT's, and Pascal VOC's mask PNGs"
    return None


def describe_json(content: Any) -> str | None:
    """What parsed JSON that cannot be used as COCO's instance annotations is ("is ..."), or None if it may be used."""
    first = content[0] if isinstance(content, list) and content else None
    if isinstance(first, dict) and {"image_id", "score"} <= first.keys():
        return "holds results (a list of predictions), not annotations"
    if isinstance(first, dict) and {"data", "annotations"} <= first.keys():
        return f"is an export of Label Studio; {IMPORT}"
    if not isinstance(content, dict):
        return None
    if "shapes" in content and "imagePath" in content:
        return f"is a labelme file of one image; {IMPORT}"
    if any(key.startswith("_via_") for key in content):
        return f"is a project of the VGG Image Annotator; {IMPORT}"
    if content.get("type") == "FeatureCollection":
        return "is GeoJSON; convert it to COCO's format first"
    annotations = content.get("annotations")
    if isinstance(annotations, dict):
        return "has an object as `annotations`, where COCO's format has a list"
    if is_panoptic(content):
        return (
            "is a panoptic annotation file (segments_info); an instance model needs instances_*.json, a model with "
            "model.num_stuff > 0 takes this one, and solov2 panoptic-quality compares two of them"
        )
    entry = annotations[0] if isinstance(annotations, list) and annotations else None
    if isinstance(entry, dict) and "caption" in entry and "category_id" not in entry:
        return "holds captions; training needs instances_*.json"
    return None


def is_panoptic(content: Any) -> bool:
    """Whether parsed JSON is a panoptic annotation file."""
    annotations = content.get("annotations") if isinstance(content, dict) else None
    return isinstance(annotations, list) and any(isinstance(x, dict) and "segments_info" in x for x in annotations)


def describe_folder(root: Path) -> str:
    """What a folder without the expected COCO files holds and what to do, as the end of a sentence.

    Only names and the beginning of some JSON files are read.
    """
    if (root.parent / "annotations").is_dir():
        return f"did you mean its parent, --data {root.parent}?"
    by_suffix: dict[str, list[str]] = defaultdict(list)
    for name in itertools.islice(_files(root), MAX_FILES):
        by_suffix[Path(name).suffix.lower()].append(name)
    kinds: dict[str | None, list[str]] = defaultdict(list)
    for name in by_suffix[".json"][:MAX_OPENED]:
        kinds[_kind_of_json(root / name)].append(name)
    images = sum(len(by_suffix[suffix]) for suffix in image_suffixes())
    archives = [name for suffix in ARCHIVE_SUFFIXES for name in by_suffix[suffix]]
    if kinds["COCO"]:
        shown = ", ".join(kinds["COCO"][:4])
        return (
            f"{root} has annotation files in COCO's format elsewhere ({shown}): name them with --train-annotations and "
            "--val-annotations, and the folders of their images with --train-images and --val-images"
        )
    for tool, found in (
        ("labelme", kinds["labelme"]),
        ("Pascal VOC or CVAT", by_suffix[".xml"]),
        ("YOLO", [name for name in by_suffix[".txt"] if images and "labels" in Path(name).parts[:-1]]),
    ):
        if found:
            return f"{root} holds annotations in the format of {tool} (such as {found[0]}); {IMPORT}"
    if archives:
        return f"{root} holds archives ({', '.join(archives[:3])}); unpack them there"
    if images:
        return f"{root} holds images but no annotation file in COCO's format"
    return f"{root} holds no annotation file in COCO's format" if any(by_suffix.values()) else f"{root} is empty"


def _files(root: Path) -> Iterator[str]:
    """Names of files relative to the folder, down to three levels, files of higher levels first within each branch."""
    for folder, folders, names in os.walk(root):
        relative = Path(folder).relative_to(root)
        folders[:] = sorted(folders) if len(relative.parts) < 3 else []
        yield from (str(relative / name) for name in sorted(names))


def _kind_of_json(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return None
    if b'"shapes"' in head:
        return "labelme"
    return "COCO" if _COCO_LIST.search(head) else None
