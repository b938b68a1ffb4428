"""Batches: padding and target assignment in the workers, the samplers, and the DataLoader.

batch  pixels uint8 [B, 3, H, W] RGB, zero-padded bottom/right, channels last in memory
       sizes int64 [B, 2] (h, w) before padding
       original_sizes int64 [B, 2] | image_ids list[int] | targets (what `assign_targets` returns; absent without it)
"""

from __future__ import annotations

import bisect
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from solov2.compute import span
from solov2.data.transforms import Sample, seeded_generator
from solov2.data.watch import OUT_OF_FILES, shared_memory_full
from solov2.errors import RunFailed
from solov2.ops.resize import padded_size

# boxes, labels, masks and perhaps ignored or, in panoptic data, semantic: see data/coco.py and data/panoptic.py
Instances = dict[str, Any]
AssignTargets = Callable[[list[Instances], tuple[int, int]], dict[str, Any]]


class Collate:
    """Samples -> batch. Runs in the worker, so that no full-size mask reaches the training process.

    Args:
        assign_targets: called with the instances (boxes, labels and masks per image, masks at the resized, unpadded
            size; in panoptic data also the semantic map, for an auxiliary semantic loss the ignored regions) and the
            padded size (H, W); without it the batch has no `targets`.
        divisor: height and width of the batch are padded to multiples of it.
    """

    def __init__(self, assign_targets: AssignTargets | None, *, divisor: int = 32) -> None:
        self.assign_targets, self.divisor = assign_targets, divisor

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The batch of these samples, in the same order."""
        sizes = torch.tensor([sample["image"].shape[1:] for sample in samples])  # int64 [B, 2]
        height, width = padded_size(tuple(sizes.amax(0).tolist()), self.divisor)
        with span("pad"):
            pixels = torch.zeros(len(samples), height, width, 3, dtype=torch.uint8)  # as in files and in networks
            for canvas, sample, (h, w) in zip(pixels.numpy(), samples, sizes.tolist()):
                image = sample["image"].permute(1, 2, 0)  # [h, w, 3]
                # One plane after the other is four times as fast where they do not lie interleaved.
                for part in (slice(None),) if image.is_contiguous() else range(3):
                    canvas[:h, :w, part] = image.numpy()[..., part]
        batch = {
            "pixels": pixels.permute(0, 3, 1, 2),
            "sizes": sizes,
            "original_sizes": torch.tensor([sample["original_size"] for sample in samples]),
            "image_ids": [sample["image_id"] for sample in samples],
        }
        if self.assign_targets is not None:
            keys: list[str] = [key for key in ("boxes", "labels", "masks", "semantic", "ignored") if key in samples[0]]
            instances = [{key: sample[key] for key in keys} for sample in samples]
            with span("targets"):
                batch["targets"] = self.assign_targets(instances, (height, width))
        if get_worker_info() is not None:
            _share(batch)
        return batch


def _share(batch: dict[str, Any]) -> None:
    """Move the tensors of a batch into shared memory, from where the training process reads them.

    torch would do the same, but in a thread whose errors are not reported: a batch for which there is no room would be
    lost silently.

    Raises:
        RunFailed: shared memory is full, or this process has too many open files.
    """
    for value in batch.values():
        if isinstance(value, dict):
            _share(value)
        elif isinstance(value, torch.Tensor) and value.numel():
            try:
                value.share_memory_()
            except (RuntimeError, OSError) as error:
                reason = OUT_OF_FILES if "Too many open files" in str(error) else shared_memory_full()
                raise RunFailed(f"a DataLoader worker {reason}") from error


# Bounds of the groups by width / height: those of 2 separate portrait and landscape, more separate the usual formats.
GROUP_BOUNDS = {1: (), 2: (1.0,), 3: (1.0, 1.4), 4: (0.71, 1.0, 1.4), 5: (0.71, 1.0, 1.4, 1.6)}


class TrainBatchSampler(Sampler[list[tuple[int, int, int]]]):
    """Batches of (index, epoch, position) for one rank; images of different shape groups never share a global batch.

    A global batch is the union of all ranks' batches in one step. The images of each group are shuffled and cut into
    global batches; an incomplete last one is filled up from the start of its group, so no image is lost and every batch
    is full. `position` numbers the epoch's samples across all ranks, repeated images included.

    Args:
        aspect_ratios: width / height of each image.
        aspect_groups: number of groups, see GROUP_BOUNDS; 2 are landscape (1 or more) and portrait.
        batch_size: images per rank and step.
        rank, world_size: this rank and the number of ranks.
        seed: the order depends only on (seed, epoch).
        shuffle: False keeps the dataset order within each group.
    """

    def __init__(
        self,
        aspect_ratios: Sequence[float],
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool = True,
        aspect_groups: int = 2,
    ) -> None:
        bounds = GROUP_BOUNDS[aspect_groups]
        self.groups = torch.tensor([bisect.bisect(bounds, ratio) for ratio in aspect_ratios], dtype=torch.int64)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.seed, self.shuffle, self.epoch, self.first_batch = seed, shuffle, 0, 0

    def set_epoch(self, epoch: int, *, first_batch: int = 0) -> None:
        """Set the epoch, which determines the order, and how many of its batches to skip."""
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank; batches to skip are counted."""
        return sum(-(-count // self._global_size) for count in self.groups.bincount().tolist())

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for number, indices in enumerate(self._global_batches()):
            if number < self.first_batch:
                continue
            start = self.rank * self.batch_size
            first = number * self._global_size + start
            own = indices[start : start + self.batch_size]
            yield [(index, self.epoch, first + offset) for offset, index in enumerate(own)]

    @property
    def _global_size(self) -> int:
        return self.batch_size * self.world_size

    def _global_batches(self) -> list[list[int]]:
        generator = seeded_generator(self.seed, self.epoch)
        count = len(self.groups)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        batches: list[list[int]] = []
        for wanted in self.groups.unique().tolist()[::-1]:
            group = order[self.groups[order] == wanted]
            steps = -(-len(group) // self._global_size)
            wrapped = torch.arange(steps * self._global_size) % max(1, len(group))
            batches += group[wrapped].reshape(steps, self._global_size).tolist()
        if not self.shuffle:
            return batches
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


class EvalSampler(Sampler[int]):
    """Every `world_size`-th index, starting at `rank`: shards without padding or duplicates."""

    def __init__(self, length: int, *, rank: int, world_size: int) -> None:
        self.indices = range(rank, length, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def build_loader(
    dataset: Dataset,
    *,
    collate: Callable[[Sequence[Sample]], dict[str, Any]],
    workers: int,
    batch_sampler: Sampler[list[tuple[int, int, int]]] | None = None,
    sampler: Sampler[int] | None = None,
    batch_size: int = 1,
    pin_memory: bool = False,
) -> DataLoader:
    """A DataLoader that uses either `batch_sampler`, or `sampler` and `batch_size`.

    It waits forever for a batch; `data.watch.watched` does not.

    Args:
        dataset: indexed with what the sampler yields.
        collate: samples -> batch, called in the workers.
        workers: number of worker processes, kept alive between epochs; 0 loads in this process.
        pin_memory: put batches in page-locked memory, so that copies to an accelerator can be asynchronous.
    """
    batching: dict[str, Any] = {"sampler": sampler, "batch_size": batch_size}
    if batch_sampler is not None:
        batching = {"batch_sampler": batch_sampler}
    return DataLoader(
        dataset,
        **batching,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # for the workers' unused seeds, so that the global generator is not advanced
        pin_memory=pin_memory,
        worker_init_fn=_init_worker,
    )


def _init_worker(worker_id: int) -> None:
    """One thread per worker; signals are left to the parent, which may still need its workers to finish a step.

    torchrun sends SIGTERM to whole process groups. A worker ignores the first; the second, its parent's, ends it.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _frame: signal.signal(number, signal.SIG_DFL))
    sys.excepthook = _report_exception


def _report_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A worker's excepthook: prints nothing when Ctrl-C ends the process that is reading a tensor from the worker.

    Exceptions raised by the dataset do not arrive here; the DataLoader passes them to the training process.
    """
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)
