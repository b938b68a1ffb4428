"""Test-time augmentation of instance models: an image is predicted in several views, and the results are merged.

Views are made from the batch that the network gets: images at the input scale, resized by a factor and mirrored.
Instances of different views are the same if they have the same class and an IoU of at least 0.5. The score of the
merged instance is the mean over all views, counting 0 for a view without it. Its mask is a vote among the views that
have it, weighted by score: a pixel is set if more than half of the weight is for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from solov2.compute import Compute, select_precision
from solov2.errors import InputError
from solov2.ops.images import ImageLike
from solov2.ops.resize import padded_size, resize_image
from solov2.ops.rle import ious, mirrored, voted
from solov2.predict import Predictor

SAME = 0.5  # minimum IoU of one instance in two views
SCALES = (0.25, 4.0)  # lowest and highest factor


@dataclass(frozen=True)
class View:
    """How an image is changed: resized by a factor, and mirrored or not."""

    scale: float = 1.0
    flip: bool = False


def parse_views(text: str) -> list[View]:
    """The views of a list such as "flip,0.75,1.25": the image itself, at each factor, and all of them mirrored.

    Raises:
        ValueError: a word is neither "flip" nor a factor from 0.25 to 4.
    """
    scales, flips = [1.0], [False]
    for word in (word.strip() for word in text.split(",")):
        if word == "flip":
            flips = [False, True]
            continue
        try:
            scale = float(word)
        except ValueError:
            scale = 0.0
        if not SCALES[0] <= scale <= SCALES[1]:
            raise ValueError(f"must be a list of flip and factors from {SCALES[0]} to {SCALES[1]:g}, got {word!r}")
        scales.append(scale)
    return [View(scale, flip) for scale in dict.fromkeys(scales) for flip in flips]


class ViewPredictor:
    """Predicts batches in several views, with the interface of `solov2.predict.Predictor`.

    Args:
        predictor: of the single views, with masks as RLEs.
        views: at least one.

    Raises:
        InputError: the model is panoptic.
    """

    def __init__(self, predictor: Predictor, views: Sequence[View]) -> None:
        if predictor.model.semantic_head is not None:
            raise InputError("test-time augmentation merges instances, so it does not work with panoptic models")
        self.predictor, self.views = predictor, list(views)
        limits = predictor.settings
        self.score_threshold = limits.get("score_threshold", predictor.model.settings.score_threshold)
        self.max_instances = limits.get("max_instances", predictor.model.settings.max_instances)
        # What a single view scores lower still counts in the mean.
        predictor.settings = limits | {"score_threshold": self.score_threshold / len(self.views)}

    def launch(self, batch: Mapping[str, Any]) -> None:
        """Run the network on each view of a batch, see `Predictor.launch`."""
        for view in self.views:
            self.predictor.launch(view_batch(batch, view, self.predictor.model.divisor))

    def collect(self) -> list[dict[str, Any]]:
        """Results of the oldest launched batch, one per image, with masks as RLEs."""
        by_view = [self.predictor.collect() for _ in self.views]
        return [
            merge_views(found, self.views, score_threshold=self.score_threshold, max_instances=self.max_instances)
            for found in zip(*by_view, strict=True)
        ]


def view_batch(batch: Mapping[str, Any], view: View, divisor: int) -> dict[str, Any]:
    """A batch, see `Predictor.launch`, of the same images in a view, padded to multiples of `divisor`."""
    images = []
    for pixels, (height, width) in zip(batch["pixels"], batch["sizes"].tolist(), strict=True):
        image = pixels[:, :height, :width]
        if view.scale != 1:
            image = resize_image(image, (max(1, round(height * view.scale)), max(1, round(width * view.scale))))
        images.append(image.flip(-1) if view.flip else image)
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    height, width = padded_size((max(h for h, _ in sizes), max(w for _, w in sizes)), divisor)
    pixels = batch["pixels"].new_zeros(len(images), 3, height, width)
    for target, image in zip(pixels, images, strict=True):
        target[:, : image.shape[1], : image.shape[2]] = image
    return {"pixels": pixels, "sizes": torch.tensor(sizes), "original_sizes": batch["original_sizes"]}


def merge_views(
    results: Sequence[Mapping[str, Any]], views: Sequence[View], *, score_threshold: float, max_instances: int
) -> dict[str, Any]:
    """Merge the results of an image in all views into one.

    Args:
        results: of each view, of its mirrored image if it is mirrored: scores [N], labels [N], masks N RLEs.
        views: in the order of the results.
        score_threshold: minimum mean score.
        max_instances: maximum number of instances, 0 for no limit.

    Returns:
        scores float32 [N] descending, labels int64 [N], masks N RLEs, boxes float32 [N, 4], on the host.
    """
    found = [
        (score, label, number, mirrored(rle)[0] if view.flip else rle)
        for number, (result, view) in enumerate(zip(results, views, strict=True))
        for score, label, rle in zip(result["scores"].tolist(), result["labels"].tolist(), result["masks"], strict=True)
    ]
    found.sort(key=lambda instance: -instance[0])
    merged = []
    for label in sorted({label for _, label, _, _ in found}):
        own = [(score, number, rle) for score, kind, number, rle in found if kind == label]
        for members in _groups([rle for _, _, rle in own], [number for _, number, _ in own]):
            scores = [own[member][0] for member in members]
            merged.append((sum(scores) / len(views), label, *voted([own[member][2] for member in members], scores)))
    merged = [instance for instance in merged if instance[0] >= score_threshold]
    merged.sort(key=lambda instance: -instance[0])
    return as_result(merged[: max_instances or None])


def _groups(rles: Sequence[dict[str, Any]], views: Sequence[int]) -> list[list[int]]:
    """Instances of one class, the best first, in groups with at most one of each view; the first one is the best."""
    overlap, groups = ious(rles, rles), list[list[int]]()
    for place, view in enumerate(views):
        near = [group for group in groups if overlap[group[0], place] >= SAME]
        near = [group for group in near if view not in [views[member] for member in group]]
        if near:
            max(near, key=lambda group: overlap[group[0], place]).append(place)
        else:
            groups.append([place])
    return groups


def as_result(instances: Sequence[tuple[float, int, dict[str, Any], tuple[int, int, int, int]]]) -> dict[str, Any]:
    """A result of (score, label, RLE, box) of each instance."""
    scores, labels, masks, boxes = zip(*instances) if instances else ((), (), (), ())
    return {
        "scores": torch.tensor(scores, dtype=torch.float32),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "masks": list(masks),
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
    }


def predict_views(
    model: Any,
    images: Iterable[ImageLike],
    views: Sequence[View],
    *,
    score_threshold: float | None = None,
    max_instances: int | None = None,
    batch_size: int = 1,
    precision: str = "tf32",
) -> Iterator[dict[str, Any]]:
    """Segment the instances of each image in several views, with one batch in memory.

    Args:
        model: a `SOLOv2` without a semantic head.
        images: a list or an iterator of what `SOLOv2.predict` takes.
        views: see `parse_views`.
        score_threshold, max_instances, batch_size, precision: as in `SOLOv2.predict`.

    Yields:
        What `SOLOv2.predict` returns for an image, with masks as RLEs, on the host.

    Raises:
        InputError: the model is panoptic.
    """
    compute = Compute(model.device, select_precision(precision, model.device))
    images = iter(images)
    while batch := list(itertools.islice(images, batch_size)):
        was_training = model.training
        try:
            single = Predictor(model, compute, score_threshold=score_threshold, max_instances=max_instances)
            predictor = ViewPredictor(single, views)
            predictor.launch(model.load_batch(batch))
            results = predictor.collect()
        finally:
            model.train(was_training)
        yield from results
