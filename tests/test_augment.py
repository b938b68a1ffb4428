"""Augmentations: right by slow references, and the same for any number of workers, threads and starts of a run."""

from __future__ import annotations

import colorsys
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_panoptic import panoptic_arguments, panoptic_config
from helpers.tiny_runs import arguments, tiny_config
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from solov2.build import build_assigner
from solov2.checkpoint import load_file
from solov2.commands.train import main
from solov2.config import Config, DataConfig, load_config
from solov2.data.augment import jitter_colors, paste_sample, random_window
from solov2.data.build import prepare_data, training_dataset, training_loader
from solov2.data.transforms import (
    TrainTransform,
    TransformedDataset,
    crop_sample,
    flip_sample,
    resize_sample,
    seeded_generator,
    transpose_sample,
)
from solov2.data_check.statistics import unseen_by_range
from solov2.errors import InputError
from solov2.ops.encoded_masks import EncodedMasks
from solov2.ops.mask_map import MaskMap
from solov2.ops.masks import encode_rle, masks_to_boxes
from solov2.training import dry_run

COLORS, CROP, SCALE, PASTE = (
    "data.color_jitter=[0.4, 0.4, 0.4, 0.1]",
    "data.crop_share=[0.3, 1]",
    "data.scale_jitter=[0.5, 1.5]",
    "data.copy_paste=0.7",
)
ALL = (COLORS, CROP, SCALE, PASTE)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded_generator(seed))


def draws(count: int, *seeds: int) -> list[float]:
    return torch.rand(count, generator=seeded_generator(*seeds)).tolist()


def make_sample(count: int, height: int, width: int, seed: int, **more: Any) -> dict[str, Any]:
    """Noise, with rectangles that may overlap as instances."""
    generator = seeded_generator(seed)
    masks = torch.zeros(count, height, width, dtype=torch.uint8)
    for mask in masks:
        y, x = (int(torch.randint(side - 3, (), generator=generator)) for side in (height, width))
        mask[y : y + 3 + y % 9, x : x + 3 + x % 9] = 1
    return {
        "image": noise(3, height, width, seed=seed),
        "boxes": masks_to_boxes(masks),
        "labels": torch.randint(0, 9, (count,), generator=generator),
        "masks": masks,
        "image_id": seed,
        "original_size": (height, width),
        **more,
    }


def encoded(masks: torch.Tensor) -> EncodedMasks:
    return EncodedMasks.from_segmentations(encode_rle(masks), (masks.shape[1], masks.shape[2]))


def drawn(masks: Any) -> torch.Tensor:
    return masks if isinstance(masks, torch.Tensor) else torch.cat([planes for planes, _ in masks.chunks(2000)])


def same(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


# ---- colors


def test_colors_change_as_a_loop_over_pixels_says() -> None:
    image, strengths, numbers = noise(3, 7, 9), (0.4, 0.5, 0.6, 0.2), (0.9, 0.2, 0.7, 0.8)
    brightness, contrast, saturation = (1 + s * (2 * d - 1) for s, d in zip(strengths[:3], numbers))
    turn = strengths[3] * (2 * numbers[3] - 1)

    def cut(value: float) -> int:
        return int(min(255, max(0, value)))

    def gray(pixel: list[int]) -> int:
        return int(0.2989 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2])

    pixels = [[cut(brightness * v) for v in pixel] for pixel in image.flatten(1).T.tolist()]
    mean = sum(map(gray, pixels)) / len(pixels)
    pixels = [[cut(contrast * v + (1 - contrast) * mean) for v in pixel] for pixel in pixels]
    pixels = [[cut(saturation * v + (1 - saturation) * gray(pixel)) for v in pixel] for pixel in pixels]
    turned = []
    for pixel in pixels:
        hue, *rest = colorsys.rgb_to_hsv(*(v / 255 for v in pixel))
        turned.append([255 * v for v in colorsys.hsv_to_rgb((hue + turn) % 1, *rest)])
    found = jitter_colors(image, strengths, numbers)
    assert found.dtype == torch.uint8 and found.shape == image.shape
    difference = found.flatten(1).T.double() - torch.tensor(turned, dtype=torch.float64)
    assert difference.abs().max() < 2 and difference.abs().mean() < 0.7


def test_each_strength_changes_what_it_names() -> None:
    image = noise(3, 20, 30)
    assert jitter_colors(image, (0, 0, 0, 0), draws(4, 1)) is image
    for place, change in enumerate((TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)):
        strengths = [0.0] * 4
        strengths[place] = 0.4
        expected = change(image, (place < 3) + 0.4 * (2 * 0.8 - 1))
        found = jitter_colors(image, strengths, (0.8,) * 4)
        assert (found.int() - expected.int()).abs().max() <= (place == 1), place  # contrast: with an exact mean
        assert not torch.equal(found, image)


def test_the_mean_of_an_image_is_exact() -> None:
    """Or else it depends on the number of threads, of which a worker has one and the training process many."""
    for number in range(8):
        half = noise(1, 601, 1003, seed=number).clamp(2, 254)
        image = torch.cat([half, 256 - half.flip(2)], dim=1).repeat(3, 1, 1)  # torchvision's gray of level v is v - 1
        assert (jitter_colors(image, (0, 1, 0, 0), (0, 0, 0, 0)) == 127).all()


# ---- crops


def test_windows_are_inside_and_reach_every_place() -> None:
    seen = {random_window((5, 7), (3, 9), draws(2, number)) for number in range(60)}
    assert seen == {(top, 0, 3, 7) for top in range(3)}
    assert random_window((5, 7), (5, 7), (0.999, 0.999)) == (0, 0, 5, 7)


def test_a_crop_of_a_sample() -> None:
    sample = make_sample(6, 30, 40, 3, semantic=noise(30, 40), ignored=noise(2, 30, 40) % 2)
    sample["boxes"][0] = torch.tensor([2.0, 3, 20.5, 9])
    found = crop_sample(sample, (5, 4, 12, 10))
    for key in ("image", "masks", "ignored", "semantic"):
        assert torch.equal(found[key], sample[key][..., 5:17, 4:14]), key
    assert found["boxes"][0].tolist() == [0, 0, 10, 4] and found["original_size"] == (30, 40)
    assert torch.equal(found["labels"], sample["labels"])


def compose(number: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A random composition of resizes, flips, transpositions and crops."""

    def apply(sample: dict[str, Any]) -> dict[str, Any]:
        for step in range(6):
            kind, first, second, *place = draws(5, number, step)
            height, width = sample["image"].shape[1:]
            if kind < 0.3:
                sample = resize_sample(sample, (4 + int(40 * first), 4 + int(40 * second)))
            elif kind < 0.5:
                sample = flip_sample(sample, horizontal=first < 0.6, vertical=second < 0.6)
            elif kind < 0.65:
                sample = transpose_sample(sample)
            else:
                limit = (max(2, int(height * (0.5 + first / 2))), max(2, int(width * (0.5 + second / 2))))
                sample = crop_sample(sample, random_window((height, width), limit, place))
        return sample

    return apply


@pytest.mark.parametrize("number", range(25))
def test_masks_drawn_late_are_those_drawn_early(number: int) -> None:
    """Segmentations, a map and planes; also the crowds and the semantic map of the same pixels."""
    planes = (noise(4, 33, 27, seed=number) < 60).to(torch.uint8)
    ids = torch.randint(0, 5, (33, 27), generator=seeded_generator(number))
    single = torch.stack([ids == key for key in (1, 2, 3, 4)]).to(torch.uint8)
    mask_map = MaskMap(np.arange(1, 5), ids.numpy())
    common = make_sample(4, 33, 27, number)
    kinds = [(planes, encoded(planes)), (single, mask_map), (single, encoded(single))]
    for early, late in kinds:
        expected, found = (
            compose(number)({**common, "masks": x, "ignored": x, "semantic": ids.to(torch.uint8)})
            for x in (early, late)
        )
        assert found["masks"].shape == tuple(expected["masks"].shape)
        for key in ("masks", "ignored"):
            assert torch.equal(drawn(found[key]), expected[key])
        extents = torch.cat([extents for _, extents in found["masks"].chunks(2000)])
        assert torch.equal(extents, masks_to_boxes(expected["masks"]).long())
        assert torch.equal(found["semantic"], expected["semantic"])
        if late is mask_map:
            wanted = torch.stack([expected["semantic"] == key for key in (1, 2, 3, 4)]).to(torch.uint8)
            assert torch.equal(drawn(found["masks"]), wanted)


def test_no_sample_is_larger_than_without_crops_and_jitter() -> None:
    sample, sizes = make_sample(5, 48, 64, 0), set()
    settings: dict[str, Any] = {"crop_share": (0.25, 1), "scale_jitter": (0.25, 3)}
    for number in range(80):
        transform = TrainTransform(scales=[96], max_size=128, **settings)
        found = transform(sample, seeded_generator(number))
        height, width = found["image"].shape[1:]
        assert height <= 96 and width <= 128 and height <= width and found["masks"].shape[1:] == (height, width)
        assert (found["boxes"][:, 2:] > found["boxes"][:, :2]).all()
        sizes.add(height)
    assert max(sizes) == 96 and min(sizes) < 40
    config = tiny_config("data.scale_jitter=[0.5, 3]", "data.crop_share=[0.2, 1]")
    assert dry_run.max_padded_size(config) == dry_run.max_padded_size(tiny_config())


def test_the_factor_enlarges_and_shrinks_instances() -> None:
    """A large square in the middle, whose pixels at the training size are those of the factor."""
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    image[:, 20:40, 30:50] = 255
    mask = image[:1] // 255
    sample = {**make_sample(1, 60, 80, 0), "image": image, "masks": mask, "boxes": masks_to_boxes(mask)}
    for factor in (0.5, 1, 2):
        transform = TrainTransform(scales=[60], max_size=200, scale_jitter=(factor, factor), flip_probability=0)
        areas = [int(transform(sample, seeded_generator(n))["masks"].sum()) for n in range(20)]
        assert max(areas) == int(400 * factor**2) and (factor > 1) == (min(areas) < max(areas))


def test_everything_off_changes_nothing() -> None:
    sample = make_sample(4, 40, 30, 2)
    for number in range(10):
        plain, off = (
            TrainTransform(scales=[30, 50], max_size=70, dihedral=True, **more)(sample, seeded_generator(number))
            for more in ({}, {"color_jitter": (0, 0, 0, 0), "crop_share": (1, 1), "scale_jitter": (1, 1)})
        )
        colored = TrainTransform(scales=[30, 50], max_size=70, dihedral=True, color_jitter=(0.4, 0.4, 0.4, 0.1))
        changed = colored(sample, seeded_generator(number))
        assert same(plain, off)
        assert same({**plain, "image": 0}, {**changed, "image": 0})  # the same size and flips
        assert not torch.equal(plain["image"], changed["image"])


# ---- copy-paste


@pytest.mark.parametrize("kind", [encoded, lambda masks: masks])
def test_pasting_as_a_loop_over_pixels_says(kind: Callable[[torch.Tensor], Any]) -> None:
    for number in range(12):
        ignored = (noise(2, 30, 40, seed=number) < 100).to(torch.uint8)
        sample = make_sample(6, 30, 40, number, ignored=kind(ignored))
        source = make_sample(number % 4 + 1, 20, 25, 100 + number)
        top, left = number % 11, number % 16
        before, pasted = sample["masks"], source["masks"]
        found = paste_sample({**sample, "masks": kind(before)}, {**source, "masks": kind(pasted)}, (top, left))
        cover = torch.zeros(30, 40, dtype=torch.bool)
        whole = torch.zeros(len(pasted), 30, 40, dtype=torch.uint8)
        whole[:, top : top + 20, left : left + 25] = pasted
        for y in range(20):
            for x in range(25):
                cover[top + y, left + x] = bool(pasted[:, y, x].any())
        for y in range(30):
            for x in range(40):
                origin = source["image"][:, y - top, x - left] if cover[y, x] else sample["image"][:, y, x]
                assert torch.equal(found["image"][:, y, x], origin)
        left_over = before * ~cover
        kept = left_over.flatten(1).sum(1) > 0
        masks = drawn(found["masks"])
        assert torch.equal(masks, torch.cat([left_over[kept], whole]))
        assert torch.equal(found["labels"], torch.cat([sample["labels"][kept], source["labels"]]))
        assert torch.equal(found["boxes"], masks_to_boxes(masks))
        hidden = (before * cover).sum()
        assert masks.sum() == before.sum() - hidden + pasted.sum()
        assert torch.equal(drawn(found["ignored"]), ignored * ~cover)


def test_hidden_instances_are_dropped_and_others_keep_their_boxes() -> None:
    sample, source = make_sample(2, 20, 20, 0), make_sample(2, 10, 10, 1)
    sample["masks"][:], source["masks"][:] = 0, 0
    sample["masks"][0, 2:5, 2:5], sample["masks"][1, 14:18, 14:18] = 1, 1
    source["masks"][0, :8, :8] = 1  # the second is empty
    sample["boxes"], source["boxes"] = (
        torch.tensor([[2.0, 2, 5, 5], [13.5, 14, 18, 18]]),
        torch.tensor([[0, 0, 8.5, 8]] * 2),
    )
    before = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in sample.items()}
    found = paste_sample(sample, source, (1, 0))
    assert found["labels"].tolist() == [sample["labels"][1], source["labels"][0]]
    assert found["boxes"].tolist() == [[13.5, 14, 18, 18], [0, 1, 8.5, 9]]
    assert same(sample, before)
    empty = {**source, "masks": torch.zeros(2, 10, 10, dtype=torch.uint8)}
    assert paste_sample(sample, empty, (1, 0)) is sample


class Samples(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = make_sample(3, 30 + 4 * index, 60 - 5 * index, index)
        return {**sample, "masks": encoded(sample["masks"])}


def test_what_is_pasted_is_all_that_differs() -> None:
    transform = TrainTransform(scales=[32, 48], max_size=64)
    never, sometimes, always = (TransformedDataset(Samples(), transform, seed=3, copy_paste=p) for p in (0, 0.5, 1))
    places = [(number % 6, 2, number) for number in range(40)]
    plain = [never[place] for place in places]
    changed = [not torch.equal(a["image"], sometimes[place]["image"]) for a, place in zip(plain, places)]
    assert 8 <= sum(changed) < 28
    sources = set()
    for first, place in zip(plain, places):
        second = always[place]
        assert first["image"].shape == second["image"].shape and first["image_id"] == second["image_id"]
        differs, cover = (first["image"] != second["image"]).any(0), drawn(second["masks"]).bool().any(0)
        assert not (differs & ~cover).any()
        sources.add(len(second["labels"]) - len(first["labels"]))
    assert max(sources) >= 2


# ---- whole runs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("augment") / "shapes"
    prepare_data(tiny_config(f"data.root={folder}"), splits=("train", "val"))
    return folder


def batches(config: Config, workers: int, epoch: int, first: int = 0) -> list[dict[str, Any]]:
    config = replace(config, data=replace(config.data, workers=workers))
    loader, sampler = training_loader(config, training_dataset(config), build_assigner(config.model))
    sampler.set_epoch(epoch, first_batch=first)
    return list(loader)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("changes", [(COLORS,), (CROP,), (SCALE,), (PASTE,), ALL])
def test_batches_for_any_number_of_workers_and_a_resumed_epoch(changes: tuple[str, ...], root: Path) -> None:
    config = tiny_config(f"data.root={root}", *changes)
    alone = batches(config, 0, 2)
    assert not same(alone[0], batches(tiny_config(f"data.root={root}"), 0, 2)[0])
    torch.manual_seed(7)
    assert len(alone) == 4 and all(map(same, alone[2:], batches(config, 0, 2, first=2)))
    for workers in (1, 3):
        there = batches(config, workers, 2)
        assert len(there) == 4 and all(map(same, alone, there)), workers
    assert not same(alone[0], batches(config, 0, 3)[0])


def test_a_broken_source_of_pasted_instances(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(root, tmp_path / "data")
    for skip in (False, True):
        config = tiny_config(f"data.root={tmp_path / 'data'}", "data.copy_paste=1", f"data.skip_broken_images={skip}")
        dataset = training_dataset(config)
        broken = dataset.image_root / dataset.record(0).file_name
        broken.write_bytes(b"")
        samples = training_loader(config, dataset, build_assigner(config.model))[0].dataset
        if skip:
            assert len([samples[1, 0, position] for position in range(100)]) == 100 and broken.name in caplog.text
        else:
            with pytest.raises(InputError, match=broken.name):
                _ = [samples[1, 0, position] for position in range(100)]


def test_panoptic_maps_stay_on_their_masks(tmp_path: Path) -> None:
    config = panoptic_config(
        f"data.root={tmp_path / 'data'}", COLORS, CROP, SCALE, "data.dihedral=true", "data.crowd=instance"
    )
    prepare_data(config, splits=("train",))
    config = replace(config, data=replace(config.data, workers=0))
    dataset = training_dataset(config)
    loader, sampler = training_loader(config, dataset, build_assigner(config.model))
    things, shapes, count = len(dataset.stuff_names), set(), 0
    for batch in sampler:
        for place in batch:
            sample = loader.dataset[place]
            union = drawn(sample["masks"]).bool().any(0)
            assert torch.equal(union, sample["semantic"] == things)
            assert sample["image"].shape[1:] == sample["semantic"].shape
            shapes.add(sample["image"].shape)
            count += len(sample["labels"])
    assert len(shapes) > 5 and count > 10


def test_a_killed_run_ends_as_a_whole_one(root: Path, tmp_path: Path) -> None:
    """With all augmentations, from a checkpoint inside the second epoch and with other numbers of workers."""
    settings = (*ALL, "train.checkpoint_steps=2", "train.keep_checkpoints=9", "train.picture_images=0")
    words = [word for change in settings for word in ("--set", change)]
    words += ["--epochs", "2", "--evaluate-every", "0"]
    assert main(arguments(root, tmp_path / "whole", *words, "--workers", "0")) == 0
    cut = tmp_path / "whole" / "step_00000006.pth"
    assert main(arguments(root, tmp_path / "cut", *words, "--workers", "1", "--resume", str(cut))) == 0
    whole, resumed = (load_file(tmp_path / name / "last.pth")["model"] for name in ("whole", "cut"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    plain = [word for change in settings[4:] for word in ("--set", change)]
    words = [*plain, "--epochs", "2", "--evaluate-every", "0", "--workers", "0"]
    assert main(arguments(root, tmp_path / "plain", *words)) == 0
    other = load_file(tmp_path / "plain" / "last.pth")["model"]
    assert not all(torch.equal(value, other[name]) for name, value in whole.items())


# ---- settings and pictures


def test_settings() -> None:
    data = load_config("solov2_r50_fpn_1x").data
    assert data.color_jitter == (0, 0, 0, 0) and data.crop_share == data.scale_jitter == (1, 1) == data.zoom
    assert data.copy_paste == 0
    for wrong in ("color_jitter=[0, 0, 0, 0.6]", "crop_share=[0.5, 0.2]", "scale_jitter=[2, 1]", "copy_paste=1.1"):
        with pytest.raises(InputError, match=f"data.{wrong.partition('=')[0]} must be"):
            tiny_config(f"data.{wrong}")
    with pytest.raises(InputError, match="data.copy_paste must be 0 for panoptic models"):
        panoptic_config("data.copy_paste=0.1")
    assert panoptic_config(COLORS, CROP, SCALE).data.zoom == (0.5, pytest.approx(1.5 / 0.3**0.5))


def test_instances_that_a_crop_enlarges_are_not_unseen() -> None:
    config = tiny_config("model.scale_ranges=[[10, 20], [18, 30], [28, 36], [30, 60], [50, 60]]")
    boxes, sizes = np.array([[0.0, 0, 6, 6], [0, 0, 64, 64], [0, 0, 2, 2]]), np.full((3, 2), 64)
    assert unseen_by_range(boxes, sizes, config.model, config.data).tolist() == [True, True, True]
    data = replace(config.data, scale_jitter=(0.9, 1.0), crop_share=(0.25, 1.0))
    assert unseen_by_range(boxes, sizes, config.model, data).tolist() == [False, False, True]


@pytest.mark.parametrize("panoptic", [False, True])
def test_pictures(
    panoptic: bool, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dry_run, "NUM_PICTURES", 4)
    make, settings = (panoptic_arguments, ALL[:3]) if panoptic else (arguments, ALL)
    data = tmp_path / "data" if panoptic else root
    words = [word for change in settings for word in ("--set", change)]
    picture = tmp_path / "samples.png"

    def run(*more: str) -> int:
        return main(make(data, tmp_path / "run", *words, *more))

    if panoptic:
        assert run("--dry-run", "--pictures", str(picture)) == 2
        assert "no data" in capsys.readouterr().err and not picture.exists()
        prepare_data(panoptic_config(f"data.root={data}"), splits=("train", "val"))
    assert run("--dry-run", "--pictures", str(picture)) == 0
    with Image.open(picture) as sheet:
        pixels = np.asarray(sheet)
    assert 1000 < pixels.shape[1] < 1300 and 4 * 500 < pixels.shape[0] < 5 * 600
    assert (pixels[:, 600:] == 0).all(2).mean() > 0.1 > (pixels[:, :550] == 0).all(2).mean()  # black padding
    assert str(picture) in capsys.readouterr().out and not (tmp_path / "run").exists()
    assert run("--dry-run", "--pictures", str(picture)) == 2  # exists
    assert run("--pictures", str(tmp_path / "new.png")) == 2 and "--dry-run" in capsys.readouterr().err
    image = next((data / "train2017").iterdir())
    before = image.read_bytes()
    assert run("--dry-run", "--overwrite", "--pictures", str(image)) == 2 and image.read_bytes() == before


def test_defaults_of_the_class() -> None:
    """Files of older versions have none of these settings."""
    assert DataConfig() == load_config("solov2_r50_fpn_1x").data
