"""The end of a run: the files about all images, and a summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from solov2.data.annotations import ImageId, parse_json
from solov2.errors import InputError
from solov2.formats import fields
from solov2.outputs import write_json
from solov2.prediction.sources import Job
from solov2.prediction.writers import ResultWriter, with_image_ids


def annotated_ids(path: Path, jobs: Sequence[Job]) -> dict[str, ImageId]:
    """The image id of each job, by its name, from an annotation file in COCO's format.

    An image is found by the end of its path: "val/a.jpg" in the file is the source "photos/val/a.jpg", and so is
    "a.jpg" if no longer name matches.

    Raises:
        InputError: the file has no image of this name, or a name belongs to two images.
    """
    content = fields.entry(parse_json(path), str(path))  # which may be the list of a test set, without annotations
    known: dict[str, ImageId] = {}
    for number, image in enumerate(fields.entries(content, "images", str(path)), start=1):
        where = f"{path}, image {number}"
        name = fields.text(image, "file_name", where)
        if not isinstance(image.get("id"), (int, str)):
            raise InputError(f"{where} has no id")
        if known.setdefault(name, image["id"]) != image["id"]:
            raise InputError(f"{path} has the file name {name} twice")
    found: dict[str, ImageId] = {}
    for job in jobs:
        parts = Path(job.source.name).parts
        ends = ["/".join(parts[start:]) for start in range(len(parts))]
        match = next((end for end in ends if end in known), None)
        if match is None:
            raise InputError(f"--annotations {path} has no image with the file name of {job.source.name}")
        found[job.name.as_posix()] = known[match]
    return found


def ordered_lines(
    jobs: Sequence[Job], finished: Mapping[str, Sequence[dict[str, Any]]], ids: Mapping[str, ImageId] | None
) -> tuple[list[dict[str, Any]], list[ImageId]]:
    """The lines of the log in the order of the jobs, and the image id of each.

    Args:
        jobs: all jobs of the run, whichever process has done them.
        finished: by name, see `solov2.prediction.finished.read_finished`.
        ids: by name, see `annotated_ids`; None: the number of the job, and for frames the numbers after the last one.
    """
    lines, image_ids, following = list[dict[str, Any]](), list[ImageId](), len(jobs)
    for job in jobs:
        name = job.name.as_posix()
        for line in finished.get(name, ()):
            following += "frame" in line
            image_ids.append(ids[name] if ids is not None else following if "frame" in line else job.number)
            lines.append(line)
    return lines, image_ids


def write_outcome(
    writer: ResultWriter, lines: Sequence[Mapping[str, Any]], image_ids: Sequence[ImageId], results: str | None
) -> None:
    """Write the files about all images, and those of --results."""
    writer.close(lines, image_ids)
    if results is not None:
        write_json(results, list(with_image_ids(lines, image_ids)))


def summary(lines: Sequence[Mapping[str, Any]], unreadable: Sequence[str], total: int) -> list[str]:
    """What could not be read, and what the formats cannot hold, each kind with its number."""
    names = ", ".join(unreadable[:5]) + (", ..." if len(unreadable) > 5 else "")
    lost = Counter[tuple[str, str]]()
    for line in lines:
        for kind, number in line["losses"].items():
            name, _, what = kind.partition(": ")
            lost[name, what] += number
    return [
        *([f"not read: {len(unreadable):,} of {total:,} sources ({names})"] if unreadable else []),
        *(f"{name}: {count:,} {what}" for (name, what), count in lost.most_common()),
    ]
