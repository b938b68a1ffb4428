"""Writing results in COCO's panoptic format, which panopticapi and the evaluation servers take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from solov2.data.annotations import ImageId
from solov2.data.panoptic_annotations import Category
from solov2.errors import InputError
from solov2.ops.panoptic import rgb_from_ids
from solov2.outputs import fold_name, write_json, write_picture


class PanopticWriter:
    """Writes FOLDER/panoptic/STEM.png image by image, and FOLDER/panoptic.json in the end (`close`).

    Every file is written aside and renamed, so it is complete or absent; whether files may be replaced is for the
    caller to check first, with `check_outputs`.

    Args:
        folder: created as needed.
        categories: of the annotation file, in any order, to list in the JSON.
        category_ids: the category id of each thing label; None for a class without one, whose segments are left out
            and become void.
        stuff_category_ids: the same for each stuff label.
    """

    def __init__(
        self,
        folder: str | Path,
        categories: Sequence[Category],
        category_ids: Sequence[int | None],
        stuff_category_ids: Sequence[int | None],
    ) -> None:
        self.json, self.segments = Path(folder) / "panoptic.json", Path(folder) / "panoptic"
        self.categories, self._ids = list(categories), {True: category_ids, False: stuff_category_ids}
        self.entries: dict[ImageId, tuple[dict[str, Any], dict[str, Any]]] = {}
        """By image id: its entries of `images` and of `annotations`. Several processes exchange them and `merge`."""
        self._taken: dict[str, str] = {}  # PNG as file systems compare it -> image

    def add(self, image_id: ImageId, file_name: str, result: Mapping[str, Any]) -> Path:
        """Write the PNG of an image.

        Args:
            image_id: for the JSON.
            file_name: of the image, relative to its dataset: its subfolders are kept, "a/x.jpg" becomes "a/x.png".
            result: `panoptic_map` int32 [H, W] and `segments`, as from `SOLOv2.predict_panoptic`.

        Returns:
            The PNG.

        Raises:
            InputError: the name is absolute, leaves the folder, or gives the PNG of an earlier image.
            OSError: disk full or no permission.
        """
        png = Path(file_name).with_suffix(".png")
        if png.is_absolute() or ".." in png.parts:
            raise InputError(f"image {image_id!r}: the file name {file_name} must be relative and without '..'")
        earlier = self._taken.get(fold_name(png.as_posix()))
        if earlier is not None:
            raise InputError(f"{file_name} and {earlier} would both be written to {png.as_posix()}; rename one of them")
        self._taken[fold_name(png.as_posix())] = file_name
        ids = result["panoptic_map"].cpu().numpy()
        infos = []
        for segment in result["segments"]:
            category = self._ids[segment["is_thing"]][segment["label"]]
            if category is None:
                ids = ids * (ids != segment["id"])
            else:
                infos.append(_segment_info(segment, category))
        write_picture(self.segments / png, Image.fromarray(rgb_from_ids(ids)))
        self.entries[image_id] = (  # only once its PNG is there
            {"id": image_id, "file_name": file_name, "height": int(ids.shape[0]), "width": int(ids.shape[1])},
            {"image_id": image_id, "file_name": png.as_posix(), "segments_info": infos},
        )
        return self.segments / png

    def path(self, file_name: str) -> Path:
        """The PNG of an image, by the name that `add` takes."""
        return self.segments / Path(file_name).with_suffix(".png")

    def merge(self, shares: Iterable[Mapping[ImageId, tuple[dict[str, Any], dict[str, Any]]]]) -> None:
        """Add the `entries` of several writers to the same folder, possibly its own too."""
        for entries in shares:
            self.entries |= entries

    def close(self, image_ids: Iterable[ImageId] | None = None) -> None:
        """Write the JSON; `image_ids` is the order of its images, by default that in which they were added.

        Raises:
            OSError: disk full or no permission.
        """
        categories = [{"id": x.id, "name": x.name, "isthing": int(x.is_thing)} for x in self.categories]
        entries = [self.entries[i] for i in (self.entries if image_ids is None else image_ids) if i in self.entries]
        images, annotations = ([entry[kind] for entry in entries] for kind in (0, 1))
        write_json(self.json, {"annotations": annotations, "categories": categories, "images": images})


def _segment_info(segment: Mapping[str, Any], category: int) -> dict[str, Any]:
    """An entry of `segments_info`."""
    x1, y1, x2, y2 = segment["box"]
    info = {
        "id": segment["id"],
        "category_id": category,
        "area": segment["area"],
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "iscrowd": 0,
        "isthing": int(segment["is_thing"]),
    }
    return info if segment["score"] is None else {**info, "score": segment["score"]}
