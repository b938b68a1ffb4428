"""Raw outputs -> instances and segments."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from solov2.errors import InputError
from solov2.models.panoptic import postprocess_panoptic
from solov2.models.postprocess import postprocess
from solov2.ops.label_map import label_map
from solov2.ops.merge import merge_segments
from solov2.settings import PanopticSettings, PostprocessSettings

GRIDS = (8, 6, 5, 4, 3)
SETTINGS = PostprocessSettings(area_thresholds=(1,) * 5)
PANOPTIC = PanopticSettings(stuff_area_limit=20)
SIZES, ORIGINAL = torch.tensor([(60, 64), (64, 50)]), torch.tensor([(70, 80), (40, 33)])


def raw_outputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Noisy outputs in which instances of all scores and four kinds of stuff are found."""
    generator = torch.Generator().manual_seed(3)

    def smooth(channels: int, size: int, factor: float) -> torch.Tensor:
        coarse = factor * torch.randn(2, channels, 3, 3, generator=generator)
        return torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").to(dtype)

    return {
        "category_logits": [smooth(3, side, 2) for side in GRIDS],
        "kernels": [smooth(8, side, 1) for side in GRIDS],
        "mask_features": smooth(8, 16, 2),
        "semantic_logits": smooth(5, 16, 3),
    }


@pytest.mark.parametrize("mask_format", ["rle", "bool"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_instances_are_unchanged_and_the_segments_come_from_them(mask_format: str, dtype: torch.dtype) -> None:
    raw = raw_outputs(dtype)
    plain = postprocess(raw, SIZES, ORIGINAL, SETTINGS, mask_format=mask_format)
    found = postprocess_panoptic(raw, SIZES, ORIGINAL, SETTINGS, PANOPTIC, mask_format=mask_format)
    kinds = set()
    for result, instances, logits, size, original in zip(found, plain, raw["semantic_logits"], SIZES, ORIGINAL):
        assert list(result) == [*instances, "panoptic_map", "segments"]
        for name in ("scores", "labels", "boxes"):
            assert torch.equal(result[name], instances[name])
        semantic = label_map(logits.float(), tuple(size.tolist()), tuple(original.tolist()))
        limits = {"score_threshold": 0.3, "overlap_threshold": 0.5, "stuff_area_limit": 20}
        merged = merge_segments(instances, semantic, 4, **limits)
        assert torch.equal(result["panoptic_map"], merged["panoptic_map"]) and result["segments"] == merged["segments"]
        assert result["panoptic_map"].shape == tuple(original.tolist())
        kinds |= {segment["is_thing"] for segment in result["segments"]}
        for segment in result["segments"]:
            if segment["is_thing"]:
                assert segment["score"] == result["scores"][segment["instance"]] >= 0.3
                assert segment["label"] == result["labels"][segment["instance"]]
    assert kinds == {True, False}


def test_settings_act() -> None:
    raw = raw_outputs()

    def segments(**changes: Any) -> list[dict[str, Any]]:
        settings = dataclasses.replace(PANOPTIC, **changes)
        return postprocess_panoptic(raw, SIZES, ORIGINAL, SETTINGS, settings)[0]["segments"]

    things = [segment for segment in segments() if segment["is_thing"]]
    assert not any(segment["is_thing"] for segment in segments(panoptic_score_threshold=1))
    assert all(segment["is_thing"] for segment in segments(stuff_area_limit=100 * 100))
    more = [segment for segment in segments(panoptic_overlap_threshold=1) if segment["is_thing"]]
    assert len(more) > len(things) > 0
    with pytest.raises(InputError, match="stuff_area_limit"):
        PanopticSettings(stuff_area_limit=-1)
