"""Find annotations and images in a folder that is not in COCO's default layout, and read what is not COCO."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from torch.utils.data import Dataset

from solov2.config import Config, DataConfig
from solov2.data.annotations import find_problems, is_file, lacks_masks, parse_json
from solov2.data.build import PATHS, worker_count
from solov2.data.recognize import describe_json
from solov2.errors import InputError, count
from solov2.formats import coco, torch_dataset
from solov2.formats.annotated import AnnotatedImage, Reading, to_coco
from solov2.formats.recognize import read, recognize
from solov2.formats.split import split

VAL_SHARE = 0.2  # of the images, where the source has no validation images
IMAGE_FOLDERS = ("", "images", "JPEGImages", "data", "{split}", "{split}2017", "images/{split}", "{split}/images")
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation")}
FLAGS = "name them with --train-annotations, --train-images, --val-annotations and --val-images"


@dataclass(frozen=True)
class FoundData:
    """Training and validation data of a folder.

    Attributes:
        contents: {"train", "val"}: COCO's JSON.
        images: the folders of their images.
        files: the annotation files, of those that are used as they are; the others have to be written.
        notes: what was found and done, for people.
    """

    contents: dict[str, dict[str, Any]]
    images: dict[str, Path]
    files: dict[str, Path]
    notes: list[str] = field(default_factory=list)


def folder_to_search(config: Config, data: str | Path | Mapping[str, str | Path] | None) -> Path | None:
    """The folder in which `find_data` has to look; None where the files that the configuration names count.

    That is so for data in COCO's default layout, for panoptic and generated data, and as soon as one of the files or
    folders is named.

    Args:
        config: of the run, with its data located.
        data: as `solov2.data.build.locate_data` takes it.
    """
    named = dict(data) if isinstance(data, Mapping) else {} if data is None else {"root": data}
    folder = Path(named.get("root", ""))
    default = all(getattr(config.data, key) == getattr(DataConfig, key) for key in PATHS)
    if named.keys() != {"root"} or config.data.shapes or config.model.num_stuff or not default or not folder.is_dir():
        return None
    return None if os.path.lexists(folder / DataConfig.train_annotations) else folder.absolute()


def find_data(folder: Path) -> FoundData | None:
    """Find and read the data of a folder: COCO's JSON under other names, or any format of `solov2.formats`.

    Files that training can take as they are, one for each split, stay where they are. Everything else is read, and
    where there are no validation images, `VAL_SHARE` of the others become such.

    Returns:
        the data; None if the folder has no annotations of a known format.

    Raises:
        InputError: the folder has several annotation files of one split, no training images, or malformed annotations.
    """
    try:
        name = recognize(folder)
    except InputError:
        return None
    if name == "coco":
        return _find_coco(folder)
    try:
        reading = read(folder, name=name)
    except InputError as error:
        raise InputError(f"{error}; or convert it with solov2 import, and name the files it writes") from error
    found = _divided(reading, f"{folder}: read as {name}")
    found.notes.extend(f"left out or changed: {line}" for line in reading.losses.lines())
    return found


def user_datasets(data: Any) -> dict[str, Dataset]:
    """{"train": dataset, "val": dataset} of `solov2.train(data=...)`; empty if `data` names files.

    A single dataset stands under both keys; it is divided later.

    Raises:
        InputError: datasets are given under other keys, or beside paths.
    """
    values = dict(data) if isinstance(data, Mapping) else {"train": data, "val": data}
    named = {key: value for key, value in values.items() if not isinstance(value, (str, os.PathLike, NoneType))}
    if named and (named.keys() != values.keys() or not {"train"} <= named.keys() <= {"train", "val"}):
        raise InputError(f"data: pass a dataset, or {{'train': dataset, 'val': dataset}}, not {', '.join(values)}")
    return named


def read_datasets(sources: Mapping[str, Dataset], place: Path, config: Config, *, divide: bool) -> FoundData:
    """The annotations of a user's datasets, each item of which is asked for once.

    Args:
        sources: "train" and "val".
        place: the folder that they will be written to.
        config: of the run.
        divide: "train" has the images of both.

    Raises:
        InputError: the model is panoptic, validation data is missing, or a dataset or an item is malformed.
    """
    if config.model.num_stuff:
        raise InputError(
            "a panoptic model takes no dataset of (image, instances): name files in COCO's panoptic format"
        )
    train, val, workers = sources["train"], sources.get("val"), worker_count(config.data.workers)
    if divide:
        return _divided(torch_dataset.read(train, place, workers=workers), type(train).__name__)
    if val is None and config.train.evaluate_every:
        raise InputError("data has no 'val': pass a dataset to evaluate with, or evaluate_every=0")
    found = FoundData({}, {}, {})
    for part, dataset in sources.items():
        reading = torch_dataset.read(dataset, place, workers=workers)
        found.contents[part], found.images[part] = to_coco(reading), place
        found.notes.append(f"{part}: {type(dataset).__name__}, {count(len(reading.images), 'image')}")
        found.notes.extend(f"left out or changed: {line}" for line in reading.losses.lines())
    return found


def _find_coco(folder: Path) -> FoundData | None:
    by_split = _coco_files(folder)
    for files in by_split.values():
        if len(files) > 1:
            names = ", ".join(str(path.relative_to(folder)) for path in list(files)[:4])
            raise InputError(f"{folder} has several annotation files in COCO's format ({names}): {FLAGS}")
    if "train" not in by_split:
        return None  # as before: the message names the files, and the flags
    contents: dict[str, dict[str, Any]] = {}
    images: dict[str, Path] = {}
    used: dict[str, Path] = {}
    notes: list[str] = []
    for part in ("train", "val"):
        for path, content in by_split.get(part, {}).items():
            place = _image_folder(folder, path, content, part)
            if _usable(content, place) and "val" in by_split:
                contents[part], images[part], used[part] = content, place, path
                notes.append(f"{part}: {path}, {count(len(content['images']), 'image')} in {place}")
                continue
            reading = coco.read(path, place)
            if not any(image.instances for image in reading.images):
                raise InputError(f"{path} has no mask; {FLAGS}")
            if "val" not in by_split:
                found = _divided(reading, str(path))
                found.notes.extend(f"left out or changed: {line}" for line in reading.losses.lines())
                return found
            contents[part], images[part] = to_coco(reading), reading.root
            notes.append(f"{part}: {path}, {count(len(reading.images), 'image')} in {place}")
            notes += [f"left out or changed: {line}" for line in reading.losses.lines()]
    return FoundData(contents, images, used, notes)


def _coco_files(folder: Path) -> dict[str, dict[Path, dict[str, Any]]]:
    """{split: {file: content}} of the instance annotations in a folder; a file that names no split is for training.

    Of several files of a split, such as those of COCO, those whose name begins with "instances" count.
    """
    found: dict[str, dict[Path, dict[str, Any]]] = defaultdict(dict)
    for path in coco.files_of(folder):
        content = parse_json(path)
        if coco.is_coco(content) and describe_json(content) is None:
            found[coco.split_of_file(path, folder) or "train"][path] = content
    for part, files in found.items():
        if len(files) > 1:
            found[part] = {path: files[path] for path in files if path.name.startswith("instances")} or files
    return dict(found)


def _image_folder(folder: Path, path: Path, content: Mapping[str, Any], part: str) -> Path:
    """The folder that has most of the images of an annotation file under their names; the first of several.

    Raises:
        InputError: none has any of them, by any way of `solov2.formats.image_folder`.
    """
    entries = (entry.get("file_name") for entry in content["images"] if isinstance(entry, dict))
    names = [name for name in entries if isinstance(name, str)]
    relative = [pattern.format(split=name) for pattern in IMAGE_FOLDERS for name in SPLIT_NAMES[part]]
    places = dict.fromkeys(place / name for place in (path.parent, path.parent.parent, folder) for name in relative)
    inside = [place for place in places if place.is_dir() and place.is_relative_to(folder)]
    best = max(inside, key=lambda place: sum(is_file(place / name) for name in names))
    return best if any(is_file(best / name) for name in names) else folder


def _usable(content: dict[str, Any], images: Path) -> bool:
    """Whether training takes an annotation file as it is, and means the same as `solov2.formats.coco.read`."""
    if next(iter(find_problems(content)), None) is not None or lacks_masks(content["annotations"]):
        return False
    used = {annotation["category_id"] for annotation in content["annotations"]}
    placeholder = any(category["id"] == 0 and 0 not in used for category in content["categories"])
    return not placeholder and all(is_file(images / image["file_name"]) for image in content["images"])


def _divided(reading: Reading, what: str) -> FoundData:
    """A reading with training and validation images, divided here if the source does not do it."""
    parts: dict[str, list[AnnotatedImage]] = defaultdict(list)
    for image in reading.images:
        parts[image.split or "train"].append(image)
    train, val, rest = parts.pop("train", []), parts.pop("val", []), parts
    if not train:
        raise InputError(f"{reading.source} has no images for training, only for {' and '.join(parts) or 'val'}")
    notes = []
    if not any(image.instances for image in val):
        if len(train) < 2:
            raise InputError(f"{reading.source} has a single image; training and validation need one each")
        train, val, _ = split([*train, *val], VAL_SHARE)
        notes.append(f"no validation images: {VAL_SHARE:.0%} of the images were set apart, always the same")
    notes += [f"{count(len(images), 'image')} of {name} not used" for name, images in rest.items()]
    sizes = f"{count(len(train), 'image')} for training, {len(val)} for validation"
    contents = {"train": to_coco(reading, train), "val": to_coco(reading, val)}
    return FoundData(contents, dict.fromkeys(contents, reading.root), {}, [f"{what}, {sizes}", *notes])


def absolute_paths(found: FoundData, folder: Path) -> dict[str, str]:
    """{"train_annotations": path, ...}, with `folder` as that of the files that have to be written."""
    paths = {f"{part}_annotations": found.files.get(part, folder / f"{part}.json") for part in found.contents}
    paths |= {f"{part}_images": place for part, place in found.images.items()}
    return {key: os.path.abspath(path) for key, path in paths.items()}


def class_names(found: FoundData) -> list[str]:
    """The names of the classes of training, in the order of their ids."""
    return [entry["name"] for entry in sorted(found.contents["train"]["categories"], key=lambda entry: entry["id"])]
