"""Split images into training and validation: stratified by class, related images together, the same every time.

Iterative stratification (Sechidis et al., "On the stratification of multi-label data", 2011): the rarest class is
distributed first, each of its groups to the part that lacks it most.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath

from solov2.errors import InputError
from solov2.formats.annotated import AnnotatedImage

IMAGES = ""  # counts as a class: the images of a group


def split(images: Sequence[AnnotatedImage], fraction: float) -> tuple[list[AnnotatedImage], list[AnnotatedImage], int]:
    """Split images.

    Args:
        images: at least two; their order does not affect which part an image belongs to.
        fraction: share of the images, and of the instances of each class, for validation; above 0 and below 1.

    Returns:
        training images, validation images, both in the given order; the number of groups.

    Raises:
        InputError: there is only one image.
    """
    if len(images) < 2:
        raise InputError("--val-split needs at least two images")
    groups = defaultdict[str, list[AnnotatedImage]](list)
    keys = group_keys([image.file_name for image in images])
    for image in images:
        groups[keys[image.file_name]].append(image)
    counts = {key: _count(members) for key, members in groups.items()}
    chosen = _choose(counts, fraction)
    train = [image for image in images if keys[image.file_name] not in chosen]
    val = [image for image in images if keys[image.file_name] in chosen]
    return train, val, len(groups)


def group_keys(names: Sequence[str]) -> dict[str, str]:
    """{file name: group}. Related are images of one folder and with the same name before a last number.

    Augmented copies, which Roboflow names NAME.rf.HASH, belong to their original. Numbers alone are no prefix, and if
    all images would be in one group, each is on its own.
    """
    plain = {name: PurePosixPath(name.partition(".rf.")[0]) for name in names}
    folders = {path.parent for path in plain.values()}

    def key(path: PurePosixPath) -> str:
        found = re.fullmatch(r"(.*\w.*?)[ _.\-]+[a-zA-Z]*\d+(?:_[a-zA-Z]\w*[a-zA-Z])?", path.stem)
        alone = path.name if len(folders) == 1 else ""
        return f"{path.parent}/{found[1] if found else alone}"

    keys = {name: key(path) for name, path in plain.items()}
    return keys if len(set(keys.values())) > 1 else {name: str(path) for name, path in plain.items()}


def _count(images: Sequence[AnnotatedImage]) -> Counter[str]:
    found = Counter(instance.class_name for image in images for instance in image.instances)
    found[IMAGES] = len(images)
    return found


def _choose(counts: dict[str, Counter[str]], fraction: float) -> set[str]:
    """The groups for validation; at least one, and not all."""
    # In an order that does not depend on that of the images, nor follows their names.
    left = sorted(counts, key=lambda key: hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest())
    total = sum(counts.values(), Counter[str]())
    need = {False: {name: (1 - fraction) * n for name, n in total.items()}}
    need[True] = {name: fraction * n for name, n in total.items()}
    frequency = Counter(name for found in counts.values() for name in found)
    chosen = set[str]()
    while left:
        rarest = min(frequency, key=lambda name: (name == IMAGES, frequency[name], name))
        members = [key for key in left if counts[key][rarest]]
        for key in sorted(members, key=lambda key: -counts[key][rarest]):
            for_val = max((False, True), key=lambda part: (need[part][rarest], need[part][IMAGES]))
            if for_val:
                chosen.add(key)
            for name, number in counts[key].items():
                need[for_val][name] -= number
                frequency[name] -= 1
        left = [key for key in left if not counts[key][rarest]]
        del frequency[rarest]
        frequency = +frequency
    smallest = sorted(counts, key=lambda key: (counts[key][IMAGES], key))
    if not chosen:
        return {smallest[0]}
    return chosen if len(chosen) < len(counts) else chosen - {smallest[-1]}
