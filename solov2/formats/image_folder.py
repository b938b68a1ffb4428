"""The image files of a folder, found by the names that annotations of other machines have for them."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from solov2.data.annotations import is_file, is_outside, require_folder
from solov2.errors import InputError
from solov2.formats.annotated import AnnotatedImage, Losses
from solov2.ops.image_files import image_suffixes
from solov2.ops.images import read_header

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class ImageFolder:
    """Finds and measures the images below a folder; no name leads out of it.

    Args:
        root: the folder.

    Raises:
        InputError: it does not exist, or is a file.
    """

    def __init__(self, root: Path) -> None:
        require_folder(root)
        self.root = root
        self._by_name: dict[str, list[str]] | None = None
        self._by_stem: dict[str, list[str]] | None = None

    def find(self, *names: str) -> str | None:
        """The file that one of the names means, relative to the folder; None if there is none.

        Of a path, the longest end that exists counts, and of the path of a URL too; at last, a file of that name in any
        subfolder, if there is just one.
        """
        paths = [_plain(name) for name in names]
        for path in paths:
            parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..", ".")]
            ends = ["/".join(parts[start:]) for start in range(len(parts))]
            found = next((end for end in ends if not is_outside(end) and is_file(self.root / end)), None)
            if found is not None:
                return found
        if self._by_name is None:
            self._by_name = defaultdict(list)
            for file in self.files():
                self._by_name[PurePosixPath(file).name].append(file)
        for path in paths:
            same = self._by_name.get(PurePosixPath(path).name, [])
            if len(same) == 1:
                return same[0]
        return None

    def find_stem(self, stem: str) -> str | None:
        """The image whose path without extension ends with `stem`, such as "train/000001"; None if there is not one."""
        if self._by_stem is None:
            self._by_stem = defaultdict(list)
            for file in self.files():
                self._by_stem[PurePosixPath(file).stem].append(file)
        wanted = PurePosixPath(stem)
        files = self._by_stem.get(wanted.name, [])
        for length in range(len(wanted.parts), 0, -1):
            end = wanted.parts[-length:]
            found = [file for file in files if PurePosixPath(file).with_suffix("").parts[-length:] == end]
            if found:
                whole = [file for file in found if len(PurePosixPath(file).parts) == length]
                return found[0] if len(found) == 1 else whole[0] if len(whole) == 1 else None
        return None

    def files(self) -> list[str]:
        """All image files by their extension, relative to the folder, sorted."""
        suffixes, found = image_suffixes(), []
        visited = set()  # links may form circles
        for place, folders, names in os.walk(self.root, followlinks=True):
            if os.path.realpath(place) in visited:
                folders.clear()
                continue
            visited.add(os.path.realpath(place))
            folders[:] = [name for name in folders if not name.startswith(".")]
            paths = (Path(place, name) for name in names if not name.startswith("."))
            found += [path.relative_to(self.root).as_posix() for path in paths if path.suffix.lower() in suffixes]
        return sorted(found)

    def measure(
        self, name: str, where: str, *, stated: tuple[int, int] | None = None, split: str | None = None
    ) -> AnnotatedImage:
        """An image without instances, with the size that its file has.

        Args:
            name: relative to the folder.
            where: the entry that names it, for messages.
            stated: (h, w) that the annotation states.
            split: which it belongs to.

        Raises:
            InputError: the file cannot be read, or has another size.
        """
        header = read_header(self.root / name)
        size = (header.height, header.width)
        if stated is not None and stated != size:
            turned = header.turned and stated == size[::-1]
            hint = "; its EXIF orientation was applied, but training reads the stored pixels: rotate the file itself"
            raise InputError(
                f"{where} was annotated at {stated[1]} x {stated[0]} pixels, but {self.root / name} has "
                f"{size[1]} x {size[0]}{hint if turned else ''}"
            )
        return AnnotatedImage(name, *size, split=split)

    def find_or_count(self, where: str, losses: Losses, *names: str) -> str | None:
        """As `find`; a file that is missing is counted in `losses`."""
        found = self.find(*names)
        if found is None:
            losses.add(MISSING, f"{names[0]} of {where}")
        return found

    def require_some(self, images: Iterable[AnnotatedImage], losses: Losses) -> None:
        """Raises InputError if images were sought and not one was found."""
        if losses.counts[MISSING] and not any(True for _ in images):
            raise InputError(
                f"not one of the annotated images is in {self.root} (first: {losses.first[MISSING]}); name their "
                "folder with --images"
            )


MISSING = "images without a file, left out with their annotations"


def _plain(name: str) -> str:
    """A name with / as its separator, without the server of a URL."""
    if re.match(r"[A-Za-z][\w+.-]+://", name):
        try:
            name = unquote(urlsplit(name).path)
        except ValueError:
            return ""
    return name.replace("\\", "/")


def split_of(path: str) -> str | None:
    """The split that a folder of a path names: "train" for images/training/1.jpg."""
    return next((SPLITS[part.lower()] for part in PurePosixPath(path).parts[:-1] if part.lower() in SPLITS), None)
