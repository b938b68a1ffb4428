"""The evaluation loop: predict this rank's share, merge all shares, compute the summary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from tqdm import tqdm

from solov2 import distributed
from solov2.data.annotations import ImageId


class LaunchAndCollect(Protocol):
    """The interface shared by `solov2.predict.Predictor` and `solov2.evaluation.oracle.Oracle`."""

    def launch(self, batch: dict[str, Any]) -> None:
        """Start computing a batch."""

    def collect(self) -> list[dict[str, Any]]:
        """The results of the oldest launched batch, one per image."""


def evaluate(
    predictor: LaunchAndCollect,
    loader: Iterable[dict[str, Any]],
    evaluator: Any,
    *,
    overlap: bool = False,
    progress: int | None = None,
    per_class: bool = False,
    write: Callable[[Sequence[ImageId], Sequence[dict[str, Any]]], None] | None = None,
) -> dict[str, Any]:
    """Predict every batch, merge the predictions of all ranks, and compute the summary.

    Args:
        predictor: returns one result per image.
        loader: batches of this rank's share of the images.
        evaluator: has update(image_ids, results), predictions, merge(shares) and summarize(per_class=).
        overlap: post-process and encode one batch in a thread while the network computes the next, with two batches in
            memory. For accelerators: on a CPU both would compete for the same cores.
        progress: number of batches in the loader, to show a progress bar on a terminal; None shows none.
        per_class: add the figures of each class.
        write: called with the image ids and results of each batch of this rank, to save more than the evaluator keeps.

    Returns:
        The evaluator's summary over all images, the same on every rank; rank 0's evaluator then holds all predictions.
    """

    def collect(image_ids: list[ImageId]) -> None:
        results = predictor.collect()
        evaluator.update(image_ids, results)
        if write is not None:
            write(image_ids, results)

    disable = True if progress is None else None  # None: only if stderr is a terminal
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
    shares = distributed.gather_objects(evaluator.predictions)
    summary = None
    if distributed.is_main():
        evaluator.merge(shares)
        summary = evaluator.summarize(per_class=per_class)
    return distributed.broadcast_object(summary)
