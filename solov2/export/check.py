"""Compare an exported file with the model that it was made from, by the instances that both find in real images."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from solov2.compute import Compute
from solov2.errors import InputError
from solov2.export.runtimes import Run
from solov2.models.solov2 import SOLOv2
from solov2.ops.image_files import check_file, find_images, open_image
from solov2.ops.images import ImageLike, to_rgb_tensor
from solov2.ops.resample import MaskResampler
from solov2.ops.resize import resize_image, resized_size

SCORE_TOLERANCE, MIN_EQUAL_PIXELS = 1e-3, 0.999  # of a float32 file
MIN_IOU = 0.5  # of the masks of two instances that are taken for the same one


@dataclass
class Comparison:
    """How a file compares with its model on some images.

    Attributes:
        runtime: what ran the file.
        instances, found: number of instances of the model, and of the file.
        matched: pairs of one of each with the same label and masks of an IoU of at least `MIN_IOU`.
        in_order: those of the pairs that have the same rank in both.
        missed: instances of either that are not in a pair, although they score more than `SCORE_TOLERANCE` above the
            lowest score that is returned.
        score_difference: the largest one in a pair.
        different_pixels, pixels: of the masks of the pairs at the original size of their images: pixels set in only one
            of both, and in at least one. Background does not count.
        min_iou: the lowest IoU of the masks of a pair.
        different_stuff, stuff_pixels: of a panoptic model: pixels at stride 4 with another best semantic channel, and
            all pixels.
        seconds, model_seconds: per image, from pixels to instances at the original size.
    """

    runtime: str
    instances: int = 0
    found: int = 0
    matched: int = 0
    in_order: int = 0
    missed: int = 0
    score_difference: float = 0.0
    different_pixels: int = 0
    pixels: int = 0
    min_iou: float = 1.0
    different_stuff: int = 0
    stuff_pixels: int = 0
    seconds: list[float] = field(default_factory=list)
    model_seconds: list[float] = field(default_factory=list)

    @property
    def equal_pixels(self) -> float:
        """Share of the pixels of all paired masks that both have."""
        return 1 - self.different_pixels / max(1, self.pixels)

    @property
    def equal_stuff(self) -> float:
        """Share of the pixels with the same best semantic channel."""
        return 1 - self.different_stuff / max(1, self.stuff_pixels)

    @property
    def within_tolerance(self) -> bool:
        """Whether the file finds what the model finds, up to rounding."""
        return (
            not self.missed
            and self.score_difference <= SCORE_TOLERANCE
            and min(self.equal_pixels, self.equal_stuff) >= MIN_EQUAL_PIXELS
        )

    def __str__(self) -> str:
        """The figures in one line."""
        stuff = f", stuff {self.equal_stuff:.4%} equal" if self.stuff_pixels else ""
        file, model = (1e3 * statistics.median(times) for times in (self.seconds, self.model_seconds))
        return (
            f"{self.runtime}: {self.matched} of {self.instances} instances found ({self.in_order} at the same rank, "
            f"{self.found - self.matched} others), scores differ by at most {self.score_difference:.1e}, masks "
            f"{self.equal_pixels:.4%} equal (lowest IoU {self.min_iou:.4f}){stuff}; {file:.1f} ms per image, the model "
            f"{model:.1f} ms"
        )

    def add(self, wanted: Mapping[str, Any], found: Mapping[str, Any], lowest_score: float) -> None:
        """Add the results of one image, both with RLE masks: of the model, and of the file."""
        pairs = match_instances(wanted, found)
        self.instances += len(wanted["scores"])
        self.found += len(found["scores"])
        self.matched += len(pairs)
        for i, j, iou in pairs:
            self.in_order += i == j
            self.score_difference = max(self.score_difference, abs(float(wanted["scores"][i] - found["scores"][j])))
            both = [wanted["masks"][i], found["masks"][j]]
            areas = [int(coco_mask.area(coco_mask.merge(both, intersect=part))) for part in (False, True)]
            self.different_pixels += areas[0] - areas[1]
            self.pixels += areas[0]
            self.min_iou = min(self.min_iou, iou)
        for result, paired in ((wanted, {i for i, _, _ in pairs}), (found, {j for _, j, _ in pairs})):
            scores = result["scores"].tolist()
            self.missed += sum(
                score > lowest_score + SCORE_TOLERANCE for i, score in enumerate(scores) if i not in paired
            )


def match_instances(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[tuple[int, int, float]]:
    """Pair the instances of two results of one image, in the order of the first: (index, index, IoU of the masks).

    Each takes, among those with its label that are left, the one whose mask is most alike, and of equal masks the one
    whose score is closest. Empty masks are alike.
    """
    if not len(wanted["scores"]) or not len(found["scores"]):
        return []
    ious = coco_mask.iou(wanted["masks"], found["masks"], [False] * len(found["masks"]))
    empty = [coco_mask.area(result["masks"]) == 0 for result in (wanted, found)]
    ious[np.logical_and.outer(*empty)] = 1
    free, pairs = set(range(len(found["scores"]))), []
    for i, (label, score) in enumerate(zip(wanted["labels"].tolist(), wanted["scores"].tolist())):
        alike = [j for j in free if found["labels"][j] == label and ious[i][j] >= MIN_IOU]
        if alike:
            best = max(alike, key=lambda j: (round(float(ious[i][j]), 3), -abs(score - float(found["scores"][j]))))
            free.remove(best)
            pairs.append((i, best, float(ious[i][best])))
    return pairs


def list_images(paths: Iterable[str | Path]) -> list[Path]:
    """The image files given, and those in the folders given and their subfolders; their headers are read.

    Raises:
        InputError: a path does not exist, a file is not an image, or a folder contains none.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        files += find_images(path) if path.is_dir() else [path]
    for file in files:
        check_file(file)
        with open_image(file):
            pass
    return files


def load_image(image: ImageLike, size: tuple[int, int], input_scale: Sequence[int]) -> dict[str, Tensor]:
    """An image as input of a file: resized as `SOLOv2.predict` does, but to fit into `size`, and padded to it.

    Args:
        image: what `SOLOv2.predict` takes.
        size: (height, width) of the padded image.
        input_scale: (maximum long edge, maximum short edge) of the resized image.

    Returns:
        pixels uint8 [1, 3, *size] in RGB, sizes int64 [1, 2] before padding, original_sizes int64 [1, 2].
    """
    decoded = to_rgb_tensor(image).cpu()
    original = decoded.shape[1], decoded.shape[2]
    inner = resized_size(original, long=input_scale[0], short=input_scale[1], inside=size)
    pixels = torch.zeros(1, 3, *size, dtype=torch.uint8)
    pixels[0, :, : inner[0], : inner[1]] = resize_image(decoded, inner)
    return {"pixels": pixels, "sizes": torch.tensor([inner]), "original_sizes": torch.tensor([original])}


def file_results(run: Run, batch: Mapping[str, Tensor], mask_threshold: float) -> dict[str, Any]:
    """The result of one image from a file: scores, labels, masks (RLE) and boxes, as of `SOLOv2.predict`; and semantic.

    Args:
        run: from `solov2.export.runtimes.open_file`.
        batch: from `load_image`.
        mask_threshold: of the model.
    """
    outputs = run(batch["pixels"], batch["sizes"])
    scores = outputs["scores"][0]
    count = int((scores > 0).sum())
    soft = outputs["masks"][0, :count]
    (size,), (original,) = batch["sizes"].tolist(), batch["original_sizes"].tolist()
    resampler = MaskResampler(
        soft.shape[1:], tuple(size), tuple(original), mask_threshold, dtype=soft.dtype, device=soft.device
    )
    masks, boxes = resampler.to_rles(soft)
    found = {"scores": scores[:count], "labels": outputs["labels"][0, :count], "masks": masks, "boxes": boxes}
    return found | ({"semantic": outputs["semantic"][0].argmax(0)} if "semantic" in outputs else {})


def model_results(model: SOLOv2, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """The result of one image from the model itself, in float32, on the same input: what `file_results` returns."""
    compute = Compute(model.device, "float32")
    with torch.no_grad(), compute.arithmetic():
        raw = model(compute.images(model, compute.move({name: batch[name] for name in ("pixels", "sizes")})))
        [result] = model.postprocess(raw, batch["sizes"], batch["original_sizes"], mask_format="rle")
    found = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in result.items()}
    return found | ({"semantic": raw["semantic_logits"][0].argmax(0).cpu()} if "semantic_logits" in raw else {})


def compare(run: Run, runtime: str, model: SOLOv2, images: Iterable[ImageLike], size: tuple[int, int]) -> Comparison:
    """Run a file and its model on images and compare what they find.

    Both get the same pixels, one image at a time, so the model pads to the size of the file, too.

    Args:
        run: from `solov2.export.runtimes.open_file`, of a file with instances, not raw outputs.
        runtime: its name.
        model: what the file was made from.
        images: what `SOLOv2.predict` takes.
        size: (height, width) of the file's input.

    Raises:
        InputError: an image cannot be read, or there are none.
    """
    model = model.eval()
    comparison = Comparison(runtime)
    for batch in (load_image(image, size, model.input_scale) for image in images):
        if not comparison.seconds:  # the first run of each is slower
            file_results(run, batch, model.settings.mask_threshold), model_results(model, batch)
        begin = time.perf_counter()
        found = file_results(run, batch, model.settings.mask_threshold)
        middle = time.perf_counter()
        wanted = model_results(model, batch)
        comparison.model_seconds.append(time.perf_counter() - middle)
        comparison.seconds.append(middle - begin)
        settings = model.settings
        full = settings.max_instances and len(wanted["scores"]) >= settings.max_instances
        lowest = float(wanted["scores"][-1]) if full else settings.score_threshold
        comparison.add(wanted, found, lowest)
        if "semantic" in wanted:
            comparison.different_stuff += int((wanted["semantic"] != found["semantic"]).sum())
            comparison.stuff_pixels += wanted["semantic"].numel()
    if not comparison.seconds:
        raise InputError("there are no images to compare on")
    return comparison
