"""Pictures of training samples as the network sees them, beside their images: what the augmentation does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image

from solov2.config import Config
from solov2.data.build import training_loader
from solov2.data.image_dataset import ImageDataset
from solov2.data.loader import AssignTargets
from solov2.data.transforms import Sample
from solov2.ops.masks import encode_rle
from solov2.ops.panoptic import measure_segments
from solov2.ops.resize import padded_size
from solov2.visualize import contact_sheet, draw_instances
from solov2.visualize_panoptic import draw_panoptic

TITLES = ("image", "training sample")
SHARP = 512  # smaller samples are enlarged to about this many pixels, or labels would hide them


def draw_samples(
    config: Config, dataset: ImageDataset, assigner: AssignTargets, *, processes: int, count: int
) -> Image.Image:
    """One sheet with the images and the samples of rank 0's first `count` positions in the first epoch.

    A sample is drawn with its masks, in the black padding of its batch, so that its size can be seen.
    """
    return contact_sheet(itertools.islice(_pairs(config, dataset, assigner, processes), count), TITLES)


def _pairs(
    config: Config, dataset: ImageDataset, assigner: AssignTargets, processes: int
) -> Iterator[tuple[Image.Image, Image.Image]]:
    loader, sampler = training_loader(config, dataset, assigner, processes=processes)
    sampler.set_epoch(0)
    for batch in sampler:
        samples = [loader.dataset[place] for place in batch]
        sizes = [sample["image"].shape[1:] for sample in samples]
        height, width = padded_size((max(h for h, _ in sizes), max(w for _, w in sizes)))
        scale = max(1, SHARP // max(height, width))
        for (index, _, _), sample in zip(batch, samples, strict=True):
            padded = Image.new("RGB", (scale * width, scale * height))
            padded.paste(_draw(sample, dataset, scale))
            yield Image.fromarray(dataset[index]["image"].permute(1, 2, 0).numpy()), padded


def _draw(sample: Sample, dataset: ImageDataset, scale: int) -> Image.Image:
    if "semantic" in sample:
        return draw_panoptic(sample["image"], _panoptic_result(sample, len(dataset.stuff_names)), dataset, scale=scale)
    masks = [rle for planes, _ in sample["masks"].chunks() for rle in encode_rle(planes)]
    result = {"labels": sample["labels"], "masks": masks}
    return draw_instances(sample["image"], result, dataset.class_names, scale=scale)


def _panoptic_result(sample: Sample, num_stuff: int) -> dict[str, Any]:
    """A panoptic sample as a result of a model: stuff label s has id s + 1, the instances have those that follow."""
    ids = sample["semantic"].to(torch.int32) + 1  # [h, w]
    ids[ids > num_stuff] = 0
    masks = (mask.bool() for planes, _ in sample["masks"].chunks() for mask in planes)
    for number, mask in enumerate(masks, start=num_stuff + 1):
        ids[mask] = number
    labels = [*range(num_stuff), *sample["labels"].tolist()]
    table = measure_segments(ids.numpy())
    segments = [
        {"id": number, "label": labels[number - 1], "is_thing": number > num_stuff, "box": box}
        for number, box in zip(table.ids.tolist(), table.boxes.tolist(), strict=True)
    ]
    return {"panoptic_map": ids, "segments": segments}
