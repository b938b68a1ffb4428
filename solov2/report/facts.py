"""What a page shows of a run: gathered by `solov2.report.gather`, laid out by `solov2.report.content`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from PIL import Image

from solov2.config import Config
from solov2.data.annotations import ImageId
from solov2.report.errors import Errors
from solov2.report.panoptic_errors import PanopticErrors
from solov2.report.ranking import Finding


class Picture(NamedTuple):
    """An image of the dataset: what it shows, and pictures of it with a title each."""

    text: str
    views: Sequence[tuple[str, Image.Image]]


@dataclass(frozen=True)
class RunFacts:
    """What a page shows of a run; every part but the figures may be missing.

    Attributes:
        name: of the run.
        summary: of the evaluation, with "per_class".
        errors: of its results, of instances or panoptic.
        names: category id -> name of the class, in the order of "per_class".
        quality: of each image that has a segment on either side, in the sense of PQ, a fraction of 1.
        findings: what to fix, ranked.
        ceiling: the summary of the training targets, as a perfect network would predict them; None: not known.
        log: the rows of log.jsonl.
        trained: category id -> number of instances or segments in training.
        evaluated: the same of the evaluation.
        pictures: best and worst images.
        speed: name -> text.
        config: None for results without a model.
        environment: name -> text.
    """

    name: str
    summary: Mapping[str, Any]
    errors: Errors | PanopticErrors
    names: Mapping[int, str]
    quality: Mapping[ImageId, float]
    findings: Sequence[Finding]
    ceiling: Mapping[str, Any] | None = None
    log: Sequence[Mapping[str, Any]] = ()
    trained: Mapping[int, int] = field(default_factory=Counter)
    evaluated: Mapping[int, int] = field(default_factory=Counter)
    pictures: Sequence[Picture] = ()
    speed: Mapping[str, str] = field(default_factory=dict)
    config: Config | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
