"""Write generated datasets in COCO's layout: drawn by several processes, complete or absent, never over other data."""

from __future__ import annotations

import functools
import json
import os
import secrets
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL.Image
from tqdm import tqdm

from solov2.errors import InputError

SPLITS = ("train2017", "val2017")
LICENSE = {"id": 0, "name": "generated, no rights reserved", "url": ""}
Drawn = TypeVar("Drawn")
WriteSplit = Callable[[Path, str, int, int, int, bool], None]


def write_dataset(root: Path, recipe: dict[str, Any], write_split: WriteSplit, *, progress: bool) -> bool:
    """Write a generated dataset unless it exists already.

    Args:
        root: folder to create; it is moved into place when complete, so it is never partial.
        recipe: what determines the dataset: train_images, val_images, size and seed, and what tells it from others.
        write_split: called with the folder, the split, the number of its images, their size, the seed and `progress`.
        progress: show a bar on a terminal.

    Returns:
        True if the dataset was written, False if the same one exists already.

    Raises:
        InputError: `root` holds other data or cannot be written, or a process was killed while drawing.
    """
    if _already_generated(root, recipe):
        return False
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        partial = root.parent / f".{root.name}.{secrets.token_hex(4)}"
        partial.mkdir()
    except OSError as error:
        raise InputError(f"cannot write the generated dataset to {root}: {error.strerror}") from error
    try:
        for split, count in zip(SPLITS, (recipe["train_images"], recipe["val_images"]), strict=True):
            write_split(partial, split, count, recipe["size"], recipe["seed"], progress)
        (partial / "shapes.json").write_text(json.dumps(recipe))
        return _publish(partial, root, recipe)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _publish(partial: Path, root: Path, recipe: dict[str, Any]) -> bool:
    """Move the complete dataset into place; False if another run has put the same one there in the meantime."""
    try:
        if root.exists():
            root.rmdir()
        os.replace(partial, root)
    except OSError:
        if not _already_generated(root, recipe):
            raise
        shutil.rmtree(partial)
        return False
    return True


def _already_generated(root: Path, recipe: dict[str, Any]) -> bool:
    """Whether the folder holds this very dataset; InputError if it holds anything else."""
    if not root.exists() or not any(root.iterdir()):
        return False
    marker = root / "shapes.json"
    if marker.is_file() and json.loads(marker.read_text()) == recipe:
        return True
    raise InputError(
        f"{root} holds other data than the shapes that data.shapes generates; name another folder with --data, or "
        "train on what is there with --set data.shapes=false"
    )


def draw_in_parallel(draw: Callable[[int], Drawn], count: int, title: str, *, progress: bool) -> Iterator[Drawn]:
    """Yield `draw(i)` for 0..count-1, in order, from several processes.

    Raises:
        InputError: a process was killed.
    """
    bar = tqdm(desc=title, total=count, leave=False, unit="image", disable=None if progress else True)
    ignore_interrupts = functools.partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    try:
        with bar, ProcessPoolExecutor(min(os.cpu_count() or 1, 8), initializer=ignore_interrupts) as pool:
            for drawn in pool.map(draw, range(count), chunksize=8):
                bar.update()
                yield drawn
    except BrokenProcessPool as error:
        raise InputError("a drawing process was killed, perhaps out of memory; run the command again") from error


def image_entry(index: int, size: int) -> dict[str, Any]:
    """The entry of `images` of the image at a position in its split."""
    return {"id": index + 1, "file_name": file_name(index), "width": size, "height": size, "license": LICENSE["id"]}


def file_name(index: int, suffix: str = ".jpg") -> str:
    """The name of the file of the image at a position in its split."""
    return f"{index + 1:012d}{suffix}"


def scene_generator(seed: int, split: str, index: int) -> np.random.Generator:
    """The source of all randomness of one image."""
    return np.random.default_rng([seed, SPLITS.index(split), index])


def save_image(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 [h, w, 3] as a JPEG."""
    PIL.Image.fromarray(pixels).save(path, quality=92)
