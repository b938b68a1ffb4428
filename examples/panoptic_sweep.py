"""Choose the thresholds of a panoptic model on a validation set: PQ for each pair of score threshold and stuff limit.

    python examples/panoptic_sweep.py runs/quickstart_panoptic/best.pth

The network runs once per image; each pair costs a merge and a comparison. Set the best pair with
`--set model.panoptic_score_threshold=X --set model.stuff_area_limit=N`, or in your configuration.
"""

from __future__ import annotations

import argparse
import time
from itertools import product

import torch
from tqdm import tqdm

import solov2
from solov2.build import resolve_config
from solov2.data.build import locate_data, validation_dataset
from solov2.data.class_matching import match_categories, match_stuff
from solov2.data.panoptic import CocoPanoptic
from solov2.evaluation.panoptic import PanopticEvaluator, percent
from solov2.ops.label_map import label_map
from solov2.ops.merge import merge_segments
from solov2.weights import find_checkpoint


@torch.no_grad()
def sweep(
    model: solov2.SOLOv2, dataset: CocoPanoptic, thresholds: list[float], limits: list[int]
) -> tuple[dict[tuple[float, int], PanopticEvaluator], float]:
    """An evaluator for each pair, and the share of the time that merges and comparisons took."""
    ids = match_categories(model.class_names, dataset), match_stuff(model.stuff_names, dataset)
    evaluators = {pair: PanopticEvaluator(dataset.panoptic, *ids) for pair in product(thresholds, limits)}
    started, merging = time.perf_counter(), 0.0
    for position in tqdm(range(len(dataset)), unit="image"):
        images, sizes, original_sizes = model.preprocess(dataset[position]["image"])
        raw = model(images)
        [instances] = model.postprocess(raw, sizes, original_sizes, mask_format="rle")
        sides = (tuple(pair[0].tolist()) for pair in (sizes, original_sizes))
        semantic = label_map(raw["semantic_logits"][0], *sides)
        before = time.perf_counter()
        for (threshold, limit), evaluator in evaluators.items():
            result = merge_segments(
                instances,
                semantic,
                len(model.stuff_names),
                score_threshold=threshold,
                overlap_threshold=model.panoptic_settings.panoptic_overlap_threshold,
                stuff_area_limit=limit,
            )
            evaluator.update([dataset.image_ids[position]], [result])
        merging += time.perf_counter() - before
    return evaluators, merging / (time.perf_counter() - started)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("weights", help="checkpoint of a panoptic model")
    parser.add_argument("--data", help="folder of the dataset; default: that of the checkpoint")
    parser.add_argument("--scores", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    parser.add_argument("--limits", type=int, nargs="+", default=[0, 64, 256, 1024, 4096])
    args = parser.parse_args()
    checkpoint = find_checkpoint(args.weights, None)
    dataset = validation_dataset(locate_data(resolve_config(None, checkpoint), args.data))
    assert isinstance(dataset, CocoPanoptic), f"{args.weights} is no panoptic model"
    evaluators, share = sweep(solov2.build_model(weights=checkpoint), dataset, args.scores, args.limits)
    print("PQ" + "".join(f"{f'stuff >= {limit}':>15}" for limit in args.limits))
    for score in args.scores:
        figures = (evaluators[score, limit].summarize()["all"]["pq"] for limit in args.limits)
        print(f"{score:<4}" + "".join(f"{percent(figure):>13}  " for figure in figures))
    print(f"{share:.0%} of the time for {len(evaluators)} merges and comparisons per image")


if __name__ == "__main__":
    main()
