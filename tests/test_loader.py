"""Batches, samplers and worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from multiprocessing import resource_sharer

import pytest
import torch
from torch.utils.data import Dataset

from solov2.data.loader import GROUP_BOUNDS, Collate, EvalSampler, TrainBatchSampler, build_loader
from solov2.data.transforms import TrainTransform, TransformedDataset
from solov2.ops.resize import padded_size, resized_size


def make_sample(number: int, height: int, width: int, count: int = 2) -> dict:
    generator = torch.Generator().manual_seed(number)
    return {
        "image": torch.randint(1, 256, (3, height, width), dtype=torch.uint8, generator=generator),
        "boxes": torch.tensor([[0.0, 0, width, height]]).repeat(count, 1),
        "labels": torch.arange(count),
        "masks": torch.ones(count, height, width, dtype=torch.uint8),
        "image_id": 100 + number,
        "original_size": (2 * height, 2 * width),
    }


class Samples(Dataset):
    """Samples of several sizes, the odd ones portrait; labels give the number of threads of the process."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        sample = make_sample(index, *((40, 30 + index) if index % 2 else (30, 40 + index)))
        return {**sample, "labels": torch.full((2,), torch.get_num_threads())}


def assign_shapes(instances: list[dict], size: tuple[int, int]) -> dict:
    return {
        "size": size,
        "labels": torch.cat([x["labels"] for x in instances]),
        "shapes": [tuple(x["masks"].shape) for x in instances],
    }


@pytest.mark.parametrize("interleaved", [False, True])
def test_batch(interleaved):
    samples = [make_sample(0, 40, 50), make_sample(1, 33, 65, count=0)]
    if interleaved:  # as images come from files
        samples = [{**x, "image": x["image"].permute(1, 2, 0).contiguous().permute(2, 0, 1)} for x in samples]
    batch = Collate(None)(samples)
    assert set(batch) == {"pixels", "sizes", "original_sizes", "image_ids"}
    pixels = batch["pixels"]
    assert pixels.shape == (2, 3, 64, 96) and pixels.dtype == torch.uint8
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    for plane, sample, (height, width) in zip(pixels, samples, [(40, 50), (33, 65)]):
        assert torch.equal(plane[:, :height, :width], sample["image"])
        assert plane[:, height:].count_nonzero() == 0 and plane[:, :, width:].count_nonzero() == 0
    assert batch["sizes"].tolist() == [[40, 50], [33, 65]] and batch["sizes"].dtype == torch.int64
    assert batch["original_sizes"].tolist() == [[80, 100], [66, 130]]
    assert batch["original_sizes"].dtype == torch.int64
    assert batch["image_ids"] == [100, 101]


def test_targets_see_unpadded_instances_and_the_padded_size():
    samples = [make_sample(0, 40, 50), make_sample(1, 33, 65, count=0)]
    received = []
    batch = Collate(lambda instances, size: received.append((instances, size)) or {"made": 1}, divisor=16)(samples)
    assert batch["targets"] == {"made": 1} and batch["pixels"].shape[2:] == (48, 80)
    ((instances, size),) = received
    assert size == (48, 80)
    for instance, sample in zip(instances, samples):
        assert set(instance) == {"boxes", "labels", "masks"}
        assert all(instance[key] is sample[key] for key in instance)


def ratios(landscape: int, portrait: int) -> list[float]:
    values = [1.0 + i / 10 for i in range(landscape)] + [0.5] * portrait
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0)).tolist()
    return [values[i] for i in order]


def test_more_shape_groups_pad_less():
    """On the formats of photographs; every image is there, and no batch mixes groups."""
    formats = [(480, 640), (427, 640), (640, 480), (640, 427), (640, 640), (360, 640), (612, 612), (333, 500)]
    sizes = [formats[i] for i in torch.randint(len(formats), (800,), generator=torch.Generator().manual_seed(0))]
    ratios_of_images = [width / height for height, width in sizes]

    def useful(groups: int) -> float:
        batches = global_batches(ratios_of_images, 16, 1, aspect_groups=groups)
        assert {index for batch in batches for index, _, _ in batch} == set(range(len(sizes)))
        bounds = GROUP_BOUNDS[groups]
        for batch in batches:
            assert len({sum(ratios_of_images[index] >= bound for bound in bounds) for index, _, _ in batch}) == 1
        inside = padded = 0
        for batch in batches:
            resized = [resized_size(sizes[index], long=1333, short=800) for index, _, _ in batch]
            height, width = padded_size((max(h for h, _ in resized), max(w for _, w in resized)))
            inside, padded = inside + sum(h * w for h, w in resized), padded + 16 * height * width
        return inside / padded

    shares = [useful(groups) for groups in range(1, 6)]
    assert shares == sorted(shares) and shares[4] >= shares[1] + 0.05


def global_batches(aspect_ratios: list[float], batch_size: int, world_size: int, epoch: int = 0, **options) -> list:
    """The union of all processes' batches, step by step."""
    samplers = [
        TrainBatchSampler(
            aspect_ratios, batch_size=batch_size, rank=rank, world_size=world_size, **{"seed": 5, **options}
        )
        for rank in range(world_size)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    batches = [list(sampler) for sampler in samplers]
    assert [len(b) for b in batches] == [len(sampler) for sampler in samplers]
    assert len({len(b) for b in batches}) == 1
    assert all(len(batch) == batch_size for b in batches for batch in b)
    return [[item for batch in step for item in batch] for step in zip(*batches)]


@pytest.mark.parametrize("counts", [(21, 10), (3, 2), (16, 0), (0, 5), (1, 1), (8, 8)])
@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 1), (2, 2), (1, 3)])
def test_train_batches(counts, batch_size, world_size):
    aspect_ratios = ratios(*counts)
    steps = global_batches(aspect_ratios, batch_size, world_size, epoch=2)
    size = batch_size * world_size
    assert len(steps) == -(-counts[0] // size) + -(-counts[1] // size)
    for step in steps:
        assert len({aspect_ratios[index] >= 1 for index, _, _ in step}) == 1
    items = [item for step in steps for item in step]
    assert {index for index, _, _ in items} == set(range(len(aspect_ratios)))
    assert {epoch for _, epoch, _ in items} == {2}
    assert sorted(position for _, _, position in items) == list(range(len(steps) * size))
    times = [sum(index == i for index, _, _ in items) for i in range(len(aspect_ratios))]
    for landscape in (True, False):  # repeated images are spread evenly
        group = [n for n, ratio in zip(times, aspect_ratios) if (ratio >= 1) == landscape]
        assert not group or max(group) - min(group) <= 1


def test_order_depends_on_seed_and_epoch_only():
    aspect_ratios = ratios(30, 11)
    first = global_batches(aspect_ratios, 2, 2)
    torch.manual_seed(1)
    assert global_batches(aspect_ratios, 2, 2) == first
    # the same global batches for any number of ranks
    assert global_batches(aspect_ratios, 4, 1) == first
    indices = [[index for index, _, _ in step] for step in first]
    for changed in ({"epoch": 1}, {"seed": 6}):
        other = global_batches(aspect_ratios, 2, 2, **changed)
        assert [[index for index, _, _ in step] for step in other] != indices


def test_orientations_are_interleaved():
    aspect_ratios = ratios(40, 40)
    kinds = [aspect_ratios[step[0][0]] >= 1 for step in global_batches(aspect_ratios, 4, 1)]
    assert kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True)


def test_without_shuffling_the_dataset_order_is_kept():
    steps = global_batches([1.5, 0.5, 2.0, 1.0, 0.6], 2, 1, epoch=3, shuffle=False)
    assert [[index for index, _, _ in step] for step in steps] == [[0, 2], [3, 0], [1, 4]]
    assert [position for step in steps for _, _, position in step] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("length", [0, 1, 7, 8])
def test_eval_shards(length):
    shards = [list(EvalSampler(length, rank=rank, world_size=3)) for rank in range(3)]
    assert sorted(sum(shards, [])) == list(range(length))
    assert [len(EvalSampler(length, rank=rank, world_size=3)) for rank in range(3)] == [len(shard) for shard in shards]
    assert shards[1] == list(range(1, length, 3))


def test_batches_do_not_depend_on_workers():
    dataset = TransformedDataset(Samples(10), TrainTransform(scales=[20, 30], max_size=60), seed=1)
    sampler = TrainBatchSampler([1.5, 0.5] * 5, batch_size=2, rank=0, world_size=1, seed=0)
    here, there = (
        build_loader(dataset, batch_sampler=sampler, collate=Collate(assign_shapes), workers=workers)
        for workers in (0, 2)
    )
    assert there.persistent_workers and not here.persistent_workers
    pinned = build_loader(dataset, batch_sampler=sampler, collate=Collate(None), workers=0, pin_memory=True)
    assert pinned.pin_memory and not here.pin_memory and not there.pin_memory
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        pairs = list(zip(here, there))
        assert len(pairs) == len(sampler) == 6
        for first, second in pairs:
            assert torch.equal(first["pixels"], second["pixels"]) and first["image_ids"] == second["image_ids"]
            assert first["targets"]["shapes"] == second["targets"]["shapes"]
            assert second["targets"]["labels"].tolist() == [1] * 4  # threads per worker


def test_eval_loader_and_an_empty_shard():
    loader = build_loader(
        Samples(5), sampler=EvalSampler(5, rank=1, world_size=2), batch_size=2, collate=Collate(None), workers=0
    )
    assert [batch["image_ids"] for batch in loader] == [[101, 103]]
    none = TrainBatchSampler([], batch_size=2, rank=0, world_size=1, seed=0)
    assert list(build_loader(Samples(5), batch_sampler=none, collate=Collate(None), workers=0)) == []


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_workers_ignore_interrupts(capfd):
    # Ctrl-C reaches every process of the terminal, but a parent that is about to save its state needs its workers.
    loader = build_loader(Samples(40), sampler=EvalSampler(40, rank=0, world_size=1), collate=Collate(None), workers=2)
    image_ids = []
    for number, batch in enumerate(loader):
        if number == 2:
            workers = multiprocessing.active_children()
            assert len(workers) == 2
            for worker in workers:
                os.kill(worker.pid, signal.SIGINT)
            time.sleep(0.2)
        image_ids += batch["image_ids"]
    assert image_ids == [100 + i for i in range(40)]
    del loader
    assert capfd.readouterr().err == ""


class HalfFinishedReader(Samples):
    """Aborts a handshake with the worker's thread that serves tensors, as an interrupted reader does."""

    def __getitem__(self, index):
        resource_sharer.DupFd(0)  # starts that thread
        with socket.socket(socket.AF_UNIX) as reader:
            reader.connect(resource_sharer._resource_sharer._address)
        time.sleep(0.2)
        return super().__getitem__(index)


@pytest.mark.skipif(sys.platform != "linux", reason="how Linux passes tensors between processes")
def test_workers_print_nothing_when_their_reader_is_interrupted(capfd):
    loader = build_loader(
        HalfFinishedReader(1), sampler=EvalSampler(1, rank=0, world_size=1), collate=Collate(None), workers=1
    )
    assert [batch["image_ids"] for batch in loader] == [[100]]
    del loader
    assert capfd.readouterr().err == ""
