"""The one way to evaluate: predict this process's share, join all shares, compute the figures."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from tqdm import tqdm

from solov2 import distributed


class LaunchAndCollect(Protocol):
    """What `solov2.predict.Predictor` and `solov2.evaluation.oracle.Oracle` have in common."""

    def launch(self, batch: dict[str, Any]) -> None:
        """Start on a batch."""

    def collect(self) -> list[dict[str, Any]]:
        """Results of the oldest batch, one per image."""


def evaluate(
    predictor: LaunchAndCollect,
    loader: Iterable[dict[str, Any]],
    evaluator: Any,
    *,
    overlap: bool = False,
    progress: int | None = None,
    per_class: bool = False,
) -> dict[str, Any]:
    """Predict every batch, join the predictions of all processes, and compute the figures.

    Args:
        predictor: makes one result per image.
        loader: batches of this process's share of the images.
        evaluator: has update(image_ids, results), predictions, merge(shares) and summarize(per_class=).
        overlap: make the results of one batch, RLE included, in a thread while the network computes the next; two
            batches are then in memory. For accelerators: on a CPU both would want the same cores.
        progress: batches of the loader, to show a bar on a terminal; None shows none.
        per_class: add the AP of each class.

    Returns:
        The evaluator's summary of all images, the same on every process; rank 0's evaluator holds all predictions.
    """

    def collect(image_ids: list[int]) -> None:
        evaluator.update(image_ids, predictor.collect())

    disable = True if progress is None else None  # None: only where stderr is a terminal
    batches = tqdm(loader, total=progress, desc="evaluating", unit="batch", leave=False, disable=disable)
    with ThreadPoolExecutor(max_workers=1) as background:
        pending: Future[None] | None = None
        for batch in batches:
            predictor.launch(batch)
            if not overlap:
                collect(batch["image_ids"])
                continue
            if pending is not None:
                pending.result()
            pending = background.submit(collect, batch["image_ids"])
        if pending is not None:
            pending.result()
    shares = distributed.all_gather_objects(evaluator.predictions)
    summary = None
    if distributed.is_main():
        evaluator.merge(shares)
        summary = evaluator.summarize(per_class=per_class)
    return distributed.broadcast_object(summary)
