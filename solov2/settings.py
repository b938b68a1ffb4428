"""Thresholds and limits of post-processing: what a configuration holds and what the model decodes with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PostprocessSettings:
    """How raw outputs become instances; the defaults are the reference's test settings."""

    area_thresholds: tuple[float, ...] = (8, 8, 16, 32, 32)  # a mask needs more stride-4 pixels than its level's number
    category_threshold: float = 0.1  # on the category score, before Matrix NMS
    mask_threshold: float = 0.5
    max_candidates: int = 500  # entering Matrix NMS; 0: all
    nms_kernel: str = "gaussian"  # gaussian, linear
    nms_sigma: float = 2.0
    score_threshold: float = 0.05  # on the final score
    max_instances: int = 100  # per image; 0: all
