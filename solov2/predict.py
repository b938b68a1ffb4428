"""Prediction, shared by `SOLOv2.predict`, the predict command, evaluation and the benchmark."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from solov2.compute import PRECISIONS, Compute, SideStream, select_precision, span
from solov2.ops.images import ImageLike, is_image, not_an_image, to_rgb_tensor
from solov2.ops.resize import padded_size, resize_image, resized_size


class Predictor:
    """Predicts batches with one model in two steps that may overlap: `launch` queues the network for a batch, and
    `collect` returns the results of the oldest batch launched.

    Args:
        model: a `SOLOv2`, used only through its `normalize`, `forward`, `postprocess` and `postprocess_panoptic`; put
            into evaluation mode.
        compute: device, precision and layout; the model must already be on the device.
        panoptic: add the segments to the results, see `SOLOv2.postprocess_panoptic`; needs a semantic head.
        mask_format: "bool" for full-size masks, "rle" for COCO RLEs.
        settings: post-processing settings by name, such as score_threshold and max_instances; None keeps the model's.
    """

    def __init__(
        self,
        model: Any,
        compute: Compute,
        *,
        panoptic: bool = False,
        mask_format: str = "rle",
        **settings: Any,
    ) -> None:
        self.model, self.compute, self.panoptic, self.mask_format = model.eval(), compute, panoptic, mask_format
        self.settings = {name: value for name, value in settings.items() if value is not None}
        self._side = SideStream(compute.device)  # masks of one batch beside the network of the next
        self._launched: deque[tuple[dict[str, Any], torch.Event | None, Tensor, Tensor]] = deque()

    @torch.no_grad()
    def launch(self, batch: Mapping[str, Any]) -> None:
        """Run the network on a batch; on an accelerator this only queues it.

        Args:
            batch: pixels uint8 [B, 3, H, W], on any device; sizes int64 [B, 2] before padding and original_sizes int64
                [B, 2], on the host.
        """
        moved = self.compute.move({"pixels": batch["pixels"], "sizes": batch["sizes"]})
        images = self.compute.images(self.model, moved)  # float32 [B, 3, H, W]
        with self.compute.arithmetic(), self.compute.autocast():
            raw = self.model(images)
        # Sizes stay on the host, which must not wait for them.
        self._launched.append((raw, self._side.mark(), batch["sizes"], batch["original_sizes"]))

    @torch.no_grad()  # gradient mode is per thread, and this may run in another one
    def collect(self) -> list[dict[str, Any]]:
        """The results of the oldest launched batch, one per image, see `solov2.models.postprocess.postprocess`."""
        raw, mark, *both_sizes = self._launched.popleft()
        postprocess = self.model.postprocess_panoptic if self.panoptic else self.model.postprocess
        with self._side.after(mark, _tensors(raw)), self.compute.arithmetic():
            results = postprocess(raw, *both_sizes, mask_format=self.mask_format, **self.settings)
        self._side.hand_over(_tensors(results))
        return results


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def predict_images(
    model: Any,
    images: Iterable[ImageLike] | ImageLike,
    batch_size: int,
    mask_format: str,
    precision: str,
    settings: Mapping[str, Any],
    *,
    panoptic: bool = False,
) -> Iterator[dict[str, Any]]:
    """The results of each image, with only one batch of images and results in memory.

    Arguments, results and errors are those of `SOLOv2.predict_iter` or, if `panoptic`, of `SOLOv2.predict_panoptic`;
    `settings` has those of post-processing, of which None keeps the model's own. Wrong arguments raise at once.
    """
    if panoptic:
        model.check_panoptic()
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if mask_format not in ("bool", "rle"):
        raise ValueError(f"mask_format must be 'bool' or 'rle', got {mask_format!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    compute = Compute(model.device, select_precision(precision, model.device))
    options = {"panoptic": panoptic, "mask_format": mask_format, **settings}
    return _predict_batches(model, iter(_several(images)), batch_size, compute, options)


def _predict_batches(
    model: Any, images: Iterator[ImageLike], batch_size: int, compute: Compute, options: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    while batch := list(itertools.islice(images, batch_size)):
        was_training = model.training
        try:
            predictor = Predictor(model, compute, **options)
            predictor.launch(model.load_batch(batch))
            results = predictor.collect()
        finally:
            model.train(was_training)
        del batch  # what waits for the caller keeps neither the images nor the results already used
        while results:
            yield results.pop(0)


def load_batch(images: Iterable[ImageLike] | ImageLike, input_scale: Sequence[int], divisor: int) -> dict[str, Tensor]:
    """Load images, resize them to `input_scale` and pad them to multiples of `divisor`, see `SOLOv2.load_batch`."""
    long, short = input_scale
    with span("decode"):
        loaded = [to_rgb_tensor(image) for image in _several(images)]
    if not loaded:
        raise ValueError("preprocess needs at least one image")
    original_sizes = [(image.shape[1], image.shape[2]) for image in loaded]
    with span("resize"):
        resized = [
            resize_image(image, resized_size(size, long=long, short=short))
            for image, size in zip(loaded, original_sizes, strict=True)
        ]
    with span("pad"):
        resized_sizes = [(image.shape[1], image.shape[2]) for image in resized]
        height, width = padded_size(tuple(map(max, zip(*resized_sizes))), divisor)
        devices = {image.device for image in resized}
        device = devices.pop() if len(devices) == 1 else torch.device("cpu")
        pixels = torch.zeros(len(resized), 3, height, width, dtype=torch.uint8, device=device)
        for target, image in zip(pixels, resized, strict=True):
            target[:, : image.shape[-2], : image.shape[-1]] = image
    return {"pixels": pixels, "sizes": torch.tensor(resized_sizes), "original_sizes": torch.tensor(original_sizes)}


def _several(images: Iterable[ImageLike] | ImageLike) -> Iterable[ImageLike]:
    """Wrap a single image in a list. Raises TypeError for what holds no images."""
    if is_image(images):
        return [images]
    if isinstance(images, Mapping) or not isinstance(images, Iterable):
        raise not_an_image(images)
    return images  # type: ignore[return-value]  # a type guard narrows only where it holds
