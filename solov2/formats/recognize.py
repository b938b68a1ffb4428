"""Recognize the format of a file or folder by its content, and read any of them."""

from __future__ import annotations

from pathlib import Path

from solov2.data.annotations import parse_json
from solov2.data.recognize import describe_bytes, describe_folder, describe_json
from solov2.errors import InputError
from solov2.formats import coco, cvat, label_studio, labelme, masks, via, yolo
from solov2.formats.annotated import Reading

READERS = {
    "coco": coco.read,
    "labelme": labelme.read,
    "yolo": yolo.read,
    "voc": masks.read_voc,
    "cityscapes": masks.read_cityscapes,
    "masks": masks.read_numbered,
    "cvat": cvat.read,
    "label-studio": label_studio.read,
    "via": via.read,
}
SINGLE = ("label-studio", "via")  # formats with one file, wherever it is in a folder
FOLDERS = ("coco", "labelme", "yolo", "voc", "cityscapes", "masks", "cvat", *SINGLE)  # of which a folder can be read
FILES = ("coco", "labelme", "yolo", "cvat", "label-studio", "via")
JSON_FORMATS = {
    "labelme": labelme.is_labelme,
    "via": via.is_via,
    "label-studio": label_studio.is_label_studio,
    "coco": coco.is_coco,
}
MAX_LOOKED_AT = 50  # JSON files of a folder


def read(source: Path, images: Path | None = None, name: str | None = None) -> Reading:
    """Read annotations.

    Args:
        source: a file or folder.
        images: folder of the images; None: where the format expects them.
        name: of the format, a key of `READERS`; None recognizes it.

    Raises:
        InputError: the format is unknown or has no masks, or a file is malformed; the message names file and entry.
    """
    if not source.exists():
        raise InputError(f"{source} does not exist")
    name = name or recognize(source)
    if name not in (FOLDERS if source.is_dir() else FILES):
        kind, other = ("folder", "file") if source.is_dir() else ("file", "folder")
        raise InputError(f"{source} is a {kind}, but {name} is read from a {other}; name that")
    if source.is_dir() and name in SINGLE:
        source, images = _only_file(source, name), images or source
    reading = READERS[name](source, images)
    if not any(image.instances for image in reading.images):
        found = f": {'; '.join(reading.losses.lines())}" if reading.losses.counts else ""
        raise InputError(f"{source} (read as {name}) has no mask{found}")
    return reading


def recognize(source: Path) -> str:
    """The name of the format of a file or folder, a key of `READERS`.

    Raises:
        InputError: it is unknown, or known to have no masks; the message says what it is and what to do.
    """
    name = _of_folder(source) if source.is_dir() else _of_file(source)
    if name is None:
        names = ", ".join(READERS)
        hint = f"{describe_folder(source)}; " if source.is_dir() else f"{source} is of no known format; "
        raise InputError(f"{hint}name its format with --format ({names})")
    return name


def _of_file(path: Path) -> str | None:
    if path.suffix.lower() in (".yaml", ".yml"):
        return "yolo"
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "cvat" if cvat.parse(path).find("image") is not None or b"<annotations>" in head else _refuse_xml(path)
    content = parse_json(path)
    for name, is_format in JSON_FORMATS.items():
        if is_format(content):
            return name
    what = describe_json(content) or describe_bytes(head)
    if what is not None:
        raise InputError(f"{path} {what}")
    return None


def _refuse_xml(path: Path) -> str:
    raise InputError(f"{path} is XML of Pascal VOC, which has boxes; its masks are in SegmentationObject/")


def _of_folder(folder: Path) -> str | None:
    if (folder / "SegmentationObject").is_dir():
        return "voc"
    if (folder / cvat.FILE_NAME).is_file():
        return "cvat"
    if (folder / "classes.txt").is_file() and (folder / "masks").is_dir():
        return "masks"
    if yolo.find_table(folder) is not None:
        return "yolo"
    if next(folder.rglob(f"*{masks.CITYSCAPES_ENDING}"), None) is not None:
        return "cityscapes"
    if any(found.is_dir() for pattern in ("labels", "*/labels") for found in folder.glob(pattern)):
        return "yolo"  # without the names of the classes, which reading it says
    for path in sorted(folder.rglob("*.json"))[:MAX_LOOKED_AT]:
        content = parse_json(path)
        name = next((name for name, is_format in JSON_FORMATS.items() if is_format(content)), None)
        if name is not None:
            return name
    return None


def _only_file(folder: Path, name: str) -> Path:
    files = [path for path in sorted(folder.rglob("*.json")) if JSON_FORMATS[name](parse_json(path))]
    if len(files) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in files[:4]) or "none"
        raise InputError(
            f"{folder} must have one file of the format {name}, not {len(files)} ({names}): name that file"
        )
    return files[0]
