"""Test-time augmentation: what the views see, and how they vote."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from solov2.build import build_model
from solov2.compute import Compute
from solov2.errors import InputError
from solov2.models.solov2 import SOLOv2
from solov2.ops.masks import decode_rle, encode_rle
from solov2.ops.resize import resize_image
from solov2.predict import Predictor
from solov2.views import View, ViewPredictor, merge_views, parse_views, predict_views, view_batch


@pytest.fixture(scope="module")
def model() -> SOLOv2:
    """A small untrained network that finds something everywhere."""
    torch.manual_seed(0)
    model = build_model("quickstart", input_scale=[96, 96], max_instances=20)
    torch.nn.init.zeros_(model.head.category_predictor.bias)
    for predictor in (model.head.category_predictor, model.head.kernel_predictor):
        torch.nn.init.normal_(predictor.weight, std=3.0)
    return model


def image(seed: int, height: int = 60, width: int = 90) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))


def test_parsing() -> None:
    assert parse_views("flip") == [View(), View(flip=True)]
    assert parse_views("flip, 0.5,2") == [View(s, f) for s in (1.0, 0.5, 2.0) for f in (False, True)]
    assert parse_views("1.5") == [View(), View(1.5)] and parse_views("1") == [View()]
    for text in ("flop", "5", "0.1", "nan", "", "flip,"):
        with pytest.raises(ValueError, match="flip"):
            parse_views(text)


def test_what_a_view_sees(model: SOLOv2) -> None:
    batch = model.load_batch([image(0), image(1, 90, 60)])
    same = view_batch(batch, View(), 32)
    assert all((same[key] == batch[key]).all() for key in batch)
    view = view_batch(batch, View(0.5, flip=True), 32)
    assert view["pixels"].shape == (2, 3, 64, 64) and (view["original_sizes"] == batch["original_sizes"]).all()
    for pixels, size, small, (height, width) in zip(
        batch["pixels"], batch["sizes"].tolist(), view["pixels"], view["sizes"].tolist()
    ):
        assert (height, width) == (size[0] // 2, size[1] // 2)
        expected = resize_image(pixels[:, : size[0], : size[1]], (height, width)).flip(-1)
        assert (
            (small[:, :height, :width] == expected).all()
            and not small[:, height:].any()
            and not small[:, :, width:].any()
        )


def test_one_view_is_the_prediction(model: SOLOv2) -> None:
    images = [image(0), image(1, 90, 60), image(2)]
    expected = model.predict(images, mask_format="rle", score_threshold=0.2, max_instances=5)
    found = list(predict_views(model, images, [View()], score_threshold=0.2, max_instances=5, batch_size=1))
    for one, other in zip(found, expected, strict=True):
        assert sorted(one) == sorted(other) and len(one["masks"]) == 5
        assert all(one[key].equal(other[key]) for key in ("labels", "boxes")) and one["masks"] == other["masks"]
        assert one["scores"].tolist() == pytest.approx(other["scores"].tolist())
    assert len(list(predict_views(model, iter(images), parse_views("flip,0.75"), batch_size=2))) == 3


def test_mirroring_an_image_mirrors_its_result(model: SOLOv2) -> None:
    [one] = predict_views(model, [image(3)], parse_views("flip"), score_threshold=0.1)
    [other] = predict_views(model, [image(3).flip(-1)], parse_views("flip"), score_threshold=0.1)
    assert len(one["masks"]) > 3 and one["scores"].tolist() == pytest.approx(other["scores"].tolist(), abs=1e-4)
    assert (decode_rle(one["masks"][0]).flip(-1) == decode_rle(other["masks"][0])).float().mean() > 0.99


def result(rows: list[tuple[float, int, slice]], *, flip: bool = False) -> dict[str, Any]:
    masks = torch.zeros(len(rows), 10, 40, dtype=torch.uint8)
    for plane, (_, _, columns) in zip(masks, rows):
        plane[:, columns] = 1
    return {
        "scores": torch.tensor([score for score, _, _ in rows]),
        "labels": torch.tensor([label for _, label, _ in rows]),
        "masks": encode_rle(masks.flip(-1) if flip else masks),
    }


def test_voting() -> None:
    views = [View(), View(flip=True), View(0.5)]
    results = [
        result([(0.9, 0, slice(0, 10)), (0.6, 1, slice(20, 30)), (0.3, 0, slice(0, 9))]),
        result([(0.8, 0, slice(1, 11)), (0.6, 0, slice(20, 30))], flip=True),
        result([(0.7, 0, slice(2, 12))]),
    ]
    found = merge_views(results, views, score_threshold=0.15, max_instances=0)
    assert found["labels"].tolist() == [0, 0, 1]
    assert found["scores"].tolist() == pytest.approx([0.8, 0.2, 0.2])
    # Columns 1 to 10: two of three masks have them. The second of its view stays apart, and its mean is too low.
    assert found["boxes"].tolist() == [[1, 0, 11, 10], [20, 0, 30, 10], [20, 0, 30, 10]]
    assert len(merge_views(results, views, score_threshold=0.05, max_instances=0)["masks"]) == 4
    assert len(merge_views(results, views, score_threshold=0.05, max_instances=2)["masks"]) == 2
    empty = merge_views([result([])] * 3, views, score_threshold=0.0, max_instances=0)
    assert empty["masks"] == [] and empty["boxes"].shape == (0, 4)


def test_what_single_views_score_lower_counts(model: SOLOv2) -> None:
    predictor = Predictor(model, Compute(torch.device("cpu")), score_threshold=0.3, max_instances=7)
    several = ViewPredictor(predictor, parse_views("flip"))
    assert predictor.settings == {"score_threshold": 0.15, "max_instances": 7}
    assert (several.score_threshold, several.max_instances) == (0.3, 7)


def test_panoptic_models_are_refused() -> None:
    panoptic = build_model("quickstart_panoptic")
    with pytest.raises(InputError, match="panoptic"):
        next(predict_views(panoptic, [image(0)], [View()]))
