"""The picture saved at the end of a run: predictions have the colors of the ground truth they match."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_api

from solov2.evaluation.picture import matching_ranks


def rle(columns: range) -> dict:
    """RLE of a 4 x 20 mask with these columns set."""
    mask = np.zeros((4, 20), np.uint8)
    mask[:, list(columns)] = 1
    return mask_api.encode(np.asfortranarray(mask))


TRUTH = {"labels": [0, 1, 0], "masks": [rle(range(0, 6)), rle(range(6, 12)), rle(range(12, 18))]}


@pytest.mark.parametrize(
    ("labels", "columns", "ranks"),
    [
        ([0, 1, 0], [range(12, 18), range(6, 12), range(0, 6)], [2, 1, 0]),
        ([0, 0], [range(0, 6), range(0, 5)], [0, 3]),  # the second prediction on one instance
        ([0, 1], [range(6, 12), range(0, 6)], [3, 4]),  # the right masks with the wrong classes
        ([0, 0], [range(0, 3), range(0, 2)], [0, 3]),  # IoU exactly 0.5, and below it
        ([0], [range(0, 0)], [3]),  # an empty mask
        ([], [], []),
    ],
)
def test_predictions_take_the_rank_of_the_ground_truth_they_match(labels, columns, ranks):
    found = {"labels": torch.tensor(labels, dtype=torch.int64), "masks": [rle(part) for part in columns]}
    assert matching_ranks(found, TRUTH) == ranks


def test_without_ground_truth_every_prediction_has_a_rank_of_its_own():
    found = {"labels": torch.tensor([0, 0]), "masks": [rle(range(3)), rle(range(3, 6))]}
    assert matching_ranks(found, {"labels": [], "masks": []}) == [0, 1]
