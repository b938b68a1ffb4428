"""The merge in numpy, for users of exported files, against the library's."""

from __future__ import annotations

import importlib.util
import re
import textwrap
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from solov2.export.graph import select_instances
from solov2.models.panoptic import postprocess_panoptic
from solov2.ops.merge import merge_segments
from solov2.settings import PanopticSettings, PostprocessSettings

GRIDS = (8, 6, 5, 4, 3)


@pytest.fixture(scope="module")
def example(repo_root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("panoptic_merge", repo_root / "examples/panoptic_merge.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not {"torch", "solov2", "F"} & vars(module).keys()
    return module


def random_raw(seed: int, height: int, width: int) -> dict[str, torch.Tensor | list[torch.Tensor]]:
    """Raw outputs of two images, smooth, in which things of all scores and six kinds of stuff are found."""
    generator = torch.Generator().manual_seed(seed)

    def smooth(channels: int, size: tuple[int, int], factor: float) -> torch.Tensor:
        coarse = factor * torch.randn(2, channels, 4, 5, generator=generator)
        return torch.nn.functional.interpolate(coarse, size, mode="bicubic")

    return {
        "category_logits": [smooth(3, (side, side), 2) for side in GRIDS],
        "kernels": [smooth(8, (side, side), 1) for side in GRIDS],
        "mask_features": smooth(8, (height // 4, width // 4), 2),
        "semantic_logits": smooth(7, (height // 4, width // 4), 3),
    }


@pytest.mark.parametrize("score_threshold", [0.0, 0.3])
@pytest.mark.parametrize("sizes", [[(150, 192), (160, 131)], [(160, 192), (97, 192)]])
def test_exported_outputs_give_the_segments_of_the_library(
    example: ModuleType, sizes: list[tuple[int, int]], score_threshold: float
) -> None:
    raw, originals = random_raw(1, 160, 192), [(211, 270), (101, 83)]
    settings = PostprocessSettings(area_thresholds=(1,) * 5, score_threshold=0.1, max_instances=30)
    limits = PanopticSettings(panoptic_score_threshold=score_threshold, stuff_area_limit=300)
    exported = {name: values.numpy() for name, values in select_instances(raw, settings).items()}
    outputs = zip(*exported.values(), raw["semantic_logits"].numpy(), sizes, originals)
    results = postprocess_panoptic(raw, sizes, originals, settings, limits)
    names, kinds = ("id", "label", "is_thing", "instance", "area"), set()
    for image, wanted in zip(outputs, results, strict=True):
        found, segments = example.panoptic(*image, score_threshold=score_threshold, stuff_area_limit=300)
        assert found.dtype == np.int32 and (found == wanted["panoptic_map"].numpy()).mean() >= 0.999
        assert len(segments) == len(wanted["segments"])
        for one, other in zip(segments, wanted["segments"]):
            assert all(one[name] == other[name] for name in names[:4])
            assert abs(one["area"] - other["area"]) <= 2
            assert one["score"] == (other["score"] and pytest.approx(other["score"], abs=1e-5))
        kinds |= {segment["is_thing"] for segment in segments}
    assert kinds == {True, False}


def test_whole_numbers_merge_alike_in_every_pixel(example: ModuleType) -> None:
    """Small rectangles: equal scores, empty masks, shares and areas right at the limits."""
    rng, total = np.random.default_rng(0), 0
    for _ in range(500):
        height, width, count, stuff = (int(rng.integers(low, high)) for low, high in ((1, 9), (1, 9), (0, 8), (1, 5)))
        masks = np.zeros((count, height, width), dtype=bool)
        for mask in masks:
            y, x, h, w = (int(rng.integers(0, high)) for high in (height, width, height + 1, width + 1))
            mask[y : y + h, x : x + w] = True
        scores, labels = -np.sort(-rng.choice([0.1, 0.3, 0.9], count).astype(np.float32)), rng.integers(0, 3, count)
        semantic = rng.integers(0, stuff + 1, (height, width)).astype(np.uint8)
        limits = {"overlap_threshold": float(rng.choice([0, 1 / 3, 0.5, 1])), "stuff_area_limit": int(rng.integers(12))}
        good = scores >= 0.3
        found, segments = example.merge(scores[good], labels[good], masks[good], semantic, stuff, **limits)
        instances = {"scores": scores, "labels": labels, "masks": masks}
        tensors = {name: torch.from_numpy(values) for name, values in instances.items()}
        wanted = merge_segments(tensors, torch.from_numpy(semantic), stuff, score_threshold=0.3, **limits)
        assert (found == wanted["panoptic_map"].numpy()).all()
        assert segments == [{key: s[key] for key in segment} for segment, s in zip(segments, wanted["segments"])]
        assert len(segments) == len(wanted["segments"])
        total += len(segments)
    assert total > 900


def test_the_page_shows_the_merge_of_the_example(repo_root: Path) -> None:
    page, source = (repo_root / path for path in ("docs/export.md", "examples/panoptic_merge.py"))
    [shown] = re.findall(r"^```python\n(panoptic_map = .*?)^```$", page.read_text(), re.M | re.S)
    assert textwrap.indent(shown, "    ") in source.read_text()
