"""COCO figures: equal to plain pycocotools, independent of sharding, right on ground truth and without predictions."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from solov2.config import load_config
from solov2.data_check.statistics import suggest_limits
from solov2.errors import InputError
from solov2.evaluation.coco import CocoEvaluator, format_table, limit_warning
from solov2.evaluation.curves import BACKENDS, FIGURES
from solov2.ops.masks import encode_rle, masks_to_boxes, segmentation_to_mask
from solov2.outputs import write_json

SIZE = 200


def load(source: Path | dict[str, Any]) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        if isinstance(source, Path):
            return COCO(str(source))
        coco = COCO()
        coco.dataset = copy.deepcopy(source)
        coco.createIndex()
    return coco


def rectangles(corners: torch.Tensor) -> torch.Tensor:
    """Masks bool [N, SIZE, SIZE] of boxes int64 [N, 4]."""
    masks = torch.zeros(len(corners), SIZE, SIZE, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, corners.tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def scene(images: int = 12, seed: int = 0) -> tuple[dict[str, Any], list[int], list[dict[str, Any]]]:
    """A dataset of rectangles in three classes, with gaps in the ids, and imperfect results for it."""
    generator = torch.Generator().manual_seed(seed)
    annotations, image_ids, results = [], [], []
    for image in range(images):
        corner = torch.randint(0, 120, (7, 2), generator=generator)
        boxes = torch.cat([corner, corner + torch.randint(6, 80, (7, 2), generator=generator)], 1).clamp(max=SIZE)
        labels = torch.randint(0, 3, (7,), generator=generator)
        for box, label, rle in zip(boxes.tolist(), labels.tolist(), encode_rle(rectangles(boxes)), strict=True):
            width, height = box[2] - box[0], box[3] - box[1]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 50 - image,
                    "category_id": (3, 7, 90)[label],
                    "iscrowd": 0,
                    "bbox": [*box[:2], width, height],
                    "area": width * height,
                    "segmentation": rle,
                }
            )
        moved = (boxes + torch.randint(-4, 5, boxes.shape, generator=generator)).clamp(0, SIZE)
        moved[:, 2:] = torch.maximum(moved[:, 2:], moved[:, :2] + 1)
        scores = torch.rand(7, generator=generator).mul(20).round().div(20).sort(descending=True).values  # with ties
        masks = rectangles(moved)
        results.append({"scores": scores, "labels": labels, "masks": masks, "boxes": masks_to_boxes(masks)})
        image_ids.append(50 - image)
    categories = [{"id": id, "name": name} for id, name in ((3, "disc"), (7, "square"), (90, "ring"), (91, "unseen"))]
    dataset = {
        "images": [{"id": id, "width": SIZE, "height": SIZE, "file_name": f"{id}.png"} for id in image_ids],
        "annotations": annotations,
        "categories": categories,
    }
    return dataset, image_ids, results


CATEGORY_IDS = [3, 7, 90, 91]


def plain_figures(coco: COCO, results: str | list[dict[str, Any]], kind: str) -> dict[str, float]:
    """The figures of pycocotools without any of our code."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(FIGURES, evaluation.stats.tolist(), strict=True))


def photo_ground_truth(coco: COCO, category_ids: list[int], *, own_boxes: bool) -> tuple[list[int], list[dict]]:
    """The annotations of a COCO file as predictions, without crowd regions."""
    image_ids, results = [], []
    for image_id, image in coco.imgs.items():
        annotations = [annotation for annotation in coco.imgToAnns[image_id] if not annotation["iscrowd"]]
        size = (image["height"], image["width"])
        planes = [segmentation_to_mask(annotation["segmentation"], size) for annotation in annotations]
        masks = torch.stack(planes).bool() if planes else torch.zeros(0, *size, dtype=torch.bool)
        boxes = torch.tensor([annotation["bbox"] for annotation in annotations]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = [category_ids.index(annotation["category_id"]) for annotation in annotations]
        results.append(
            {
                "scores": torch.ones(len(labels)),
                "labels": torch.tensor(labels, dtype=torch.int64),
                "masks": masks,
                "boxes": boxes if own_boxes else masks_to_boxes(masks),
            }
        )
        image_ids.append(image_id)
    return image_ids, results


def test_ground_truth_as_predictions(coco_photos: Path, tmp_path: Path) -> None:
    coco = load(coco_photos / "annotations/instances_val2017.json")
    category_ids = sorted(coco.cats)
    evaluator = CocoEvaluator(coco, category_ids)
    evaluator.update(*photo_ground_truth(coco, category_ids, own_boxes=True))
    summary = evaluator.summarize()
    assert summary["segm"]["AP"] == pytest.approx(1.0, abs=1e-9)
    assert summary["bbox"]["AP"] == pytest.approx(1.0, abs=1e-9)

    tight = CocoEvaluator(coco, category_ids)
    tight.update(*photo_ground_truth(coco, category_ids, own_boxes=False))
    assert round(tight.summarize()["bbox"]["AP"], 3) == 0.967

    write_json(tmp_path / "results.json", tight.results())
    assert plain_figures(coco, str(tmp_path / "results.json"), "segm")["AP"] == pytest.approx(1.0, abs=1e-9)


def test_figures_equal_those_of_pycocotools() -> None:
    dataset, image_ids, results = scene()
    evaluator = CocoEvaluator(load(dataset), CATEGORY_IDS)
    evaluator.update(image_ids, results)
    summary = evaluator.summarize()
    assert 0.1 < summary["segm"]["AP"] < 0.9  # not trivial
    assert 0 < summary["segm"]["AP_small"] < 1
    assert summary["segm"] == plain_figures(load(dataset), evaluator.results(), "segm")
    assert summary["bbox"] == plain_figures(load(dataset), evaluator.box_results(), "bbox")
    assert all(type(value) is float for kind in ("segm", "bbox") for value in summary[kind].values())
    assert summary["max_detections"] == 100


def degraded_photographs(coco: COCO, category_ids: list[int]) -> tuple[list[int], list[dict[str, Any]]]:
    """The annotations of photographs with some wrong labels, shifted masks, doubled instances and tied scores."""
    image_ids, results = photo_ground_truth(coco, category_ids, own_boxes=False)
    image_ids, results = image_ids[:20], results[:20]
    generator = torch.Generator().manual_seed(0)
    for result in results:
        count = len(result["scores"])
        moved = torch.stack([mask.roll(6, 1) for mask in result["masks"]]) if count else result["masks"]
        result["masks"] = torch.cat([result["masks"], moved])
        result["boxes"] = masks_to_boxes(result["masks"])
        labels = result["labels"].repeat(2)
        wrong = torch.rand(2 * count, generator=generator) < 0.1
        result["labels"] = torch.where(wrong, (labels + 1) % len(category_ids), labels)
        result["scores"] = torch.rand(2 * count, generator=generator).mul(20).round().div(20)
    return image_ids, results


def test_faster_coco_eval_agrees_to_15_decimals(coco_photos: Path) -> None:
    """Rectangles, photographs with crowd regions, and no predictions.

    pycocotools adds 2e-16 to the divisor of a precision, which shows in a curve that starts with a single hit.
    """
    pytest.importorskip("faster_coco_eval")
    dataset, image_ids, results = scene()
    coco = load(coco_photos / "annotations/instances_val2017.json")
    photographs = degraded_photographs(coco, sorted(coco.cats))
    cases = [
        (load(dataset), CATEGORY_IDS, image_ids, results),
        (coco, sorted(coco.cats), *photographs),
        (load(dataset), CATEGORY_IDS, [], []),
    ]
    for truth, category_ids, ids, found in cases:
        summaries = []
        for backend in BACKENDS:
            evaluator = CocoEvaluator(truth, category_ids, backend=backend)
            evaluator.update(ids, found)
            summaries.append(evaluator.summarize(per_class=True))
        assert summaries[0].keys() == summaries[1].keys()
        for kind in ("segm", "bbox"):
            assert summaries[1][kind] == pytest.approx(summaries[0][kind], rel=0, abs=5e-16)
            assert all(type(value) is float for value in summaries[1][kind].values())
        for name, figures in summaries[0]["per_class"].items():
            assert summaries[1]["per_class"][name] == pytest.approx(figures, rel=0, abs=5e-16)


def test_unavailable_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, _, _ = scene()
    with pytest.raises(InputError, match="slow; choose one of pycocotools, faster-coco-eval"):
        CocoEvaluator(load(dataset), CATEGORY_IDS, backend="slow")
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(InputError, match=r"faster-coco-eval .*solov2\[fast\]"):
        CocoEvaluator(load(dataset), CATEGORY_IDS, backend="faster-coco-eval")


def test_the_area_is_that_of_the_mask_not_of_its_box() -> None:
    """A thin diagonal is small as a mask and large as a box; with the box's area it would count as large."""
    mask = torch.eye(SIZE, dtype=torch.bool)[None]
    far = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    far[0, :8, 150:158] = True
    diagonal, square = encode_rle(torch.cat([mask, far]))
    dataset = {
        "images": [{"id": 1, "width": SIZE, "height": SIZE}],
        "categories": [{"id": 1, "name": "line"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 1,
                "iscrowd": 0,
                "area": 64,
                "bbox": [150, 0, 8, 8],
                "segmentation": square,
            }
        ],
    }
    masks = torch.cat([mask, far])
    result = {
        "scores": torch.tensor([0.9, 0.8]),
        "labels": torch.zeros(2, dtype=torch.int64),
        "masks": masks,
        "boxes": masks_to_boxes(masks),
    }
    evaluator = CocoEvaluator(load(dataset), [1])
    evaluator.update([1], [result])
    assert evaluator.summarize()["segm"]["AP_small"] == pytest.approx(0.5)  # the diagonal is a small false positive
    assert evaluator.summarize()["bbox"]["AP_small"] == pytest.approx(1.0)  # its box is large, so it does not count


def test_sharding_changes_no_digit() -> None:
    dataset, image_ids, results = scene()
    whole = CocoEvaluator(load(dataset), CATEGORY_IDS)
    whole.update(image_ids, results)
    shards = []
    for rank in (0, 1, 2):
        shard = CocoEvaluator(load(dataset), CATEGORY_IDS)
        for index in reversed(range(rank, len(image_ids), 3)):
            shard.update([image_ids[index]], [results[index]])
        shard.update(image_ids[:1], results[:1])  # image 0 comes from all three processes
        shards.append(shard)
    for order in ((0, 1, 2), (2, 0, 1)):
        merged = CocoEvaluator(load(dataset), CATEGORY_IDS)
        merged.update(image_ids[3:4], results[3:4])
        merged.merge([shards[rank].predictions for rank in order])
        assert merged.results() == whole.results()
        assert merged.summarize(per_class=True) == whole.summarize(per_class=True)


def test_no_predictions_give_zero() -> None:
    dataset, image_ids, results = scene(images=2)
    nothing = [{key: value[:0] for key, value in result.items()} for result in results]
    evaluator = CocoEvaluator(load(dataset), CATEGORY_IDS)
    assert evaluator.summarize()["segm"]["AP"] == 0.0
    evaluator.update(image_ids, nothing)
    assert evaluator.results() == []
    summary = evaluator.summarize(per_class=True)
    for kind in ("segm", "bbox"):
        assert all(summary[kind][figure] == 0.0 for figure in ("AP", "AP50", "AR100"))
    assert summary["per_class"]["disc"] == {"segm_AP": 0.0, "bbox_AP": 0.0}
    assert summary["per_class"]["unseen"] == {"segm_AP": -1.0, "bbox_AP": -1.0}


def test_an_image_without_predictions_of_known_classes() -> None:
    dataset, image_ids, results = scene(images=2)
    evaluator = CocoEvaluator(load(dataset), [None, None, None, None])
    evaluator.update(image_ids, results)
    assert evaluator.results() == [] and evaluator.summarize()["segm"]["AP"] == 0.0


def test_labels_map_to_categories_in_any_order_and_to_none() -> None:
    """Labels 0, 1, 2 as 2, 0, 1 give the same figures; a class that maps to None has AP 0, the others keep theirs."""
    dataset, image_ids, results = scene()
    plain, moved, without = (
        CocoEvaluator(load(dataset), ids) for ids in (CATEGORY_IDS, [7, 90, 3, 91], [3, None, 90, 91])
    )
    plain.update(image_ids, results)
    without.update(image_ids, results)
    moved.update(image_ids, [{**result, "labels": (result["labels"] + 2) % 3} for result in results])
    whole = plain.summarize(per_class=True)
    assert moved.results() == plain.results() and moved.summarize(per_class=True) == whole
    lacking = without.summarize(per_class=True)["per_class"]
    assert lacking == {**whole["per_class"], "square": {"segm_AP": 0.0, "bbox_AP": 0.0}}
    assert without.results() == [entry for entry in plain.results() if entry["category_id"] != 7]


def crowd(count: int) -> tuple[COCO, dict[str, Any]]:
    """One image with `count` squares of one class, and the perfect result."""
    corner = torch.tensor([(12 * (i % 16), 12 * (i // 16)) for i in range(count)])
    boxes = torch.cat([corner, corner + 10], 1)
    masks = rectangles(boxes)
    dataset = {
        "images": [{"id": 1, "width": SIZE, "height": SIZE, "file_name": "cells.png"}],
        "categories": [{"id": 5, "name": "cell"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 5, "iscrowd": 0, "segmentation": rle}
            for i, rle in enumerate(encode_rle(masks), 1)
        ],
    }
    scores = torch.linspace(0.9, 0.1, count)
    labels = torch.zeros(count, dtype=torch.int64)
    return load(dataset), {"scores": scores, "labels": labels, "masks": masks, "boxes": masks_to_boxes(masks)}


@pytest.mark.parametrize(("backend", "count"), [("pycocotools", 128), ("faster-coco-eval", 256)])
def test_more_than_100_objects(backend: str, count: int) -> None:
    """A perfect result on 256 objects scores 1 if 300 count, and 40 of 101 recall thresholds if COCO's 100 do."""
    if backend != BACKENDS[0]:
        pytest.importorskip("faster_coco_eval")
    coco, result = crowd(count)
    found = {}
    for limit in (100, 300):
        evaluator = CocoEvaluator(coco, [5], backend=backend, max_detections=limit)
        evaluator.update([1], [result])
        found[limit] = evaluator.summarize(per_class=True)
    assert found[100]["segm"]["AP"] == pytest.approx(int(10000 / count + 1) / 101)
    assert found[100]["segm"]["AR100"] == 100 / count
    assert {found[300][kind][name] for kind in ("segm", "bbox") for name in ("AP", "AP75", "AP_small", "AR300")} == {
        1.0
    }
    assert found[300]["per_class"]["cell"] == {"segm_AP": 1.0, "bbox_AP": 1.0}
    assert found[300]["max_detections"] == 300 and "AR100" not in found[300]["segm"]
    for figure in ("AR1", "AR10"):
        assert found[300]["segm"][figure] == found[100]["segm"][figure]
    assert "300 detections per image" in format_table(found[300]) and "AR300" in format_table(found[300])
    assert "detections" not in format_table(found[100])


def test_a_higher_limit_changes_nothing_where_fewer_are_found() -> None:
    dataset, image_ids, results = scene()
    summaries = []
    for limit in (100, 1000):
        evaluator = CocoEvaluator(load(dataset), CATEGORY_IDS, max_detections=limit)
        evaluator.update(image_ids, results)
        summaries.append(evaluator.summarize(per_class=True))
    for kind in ("segm", "bbox"):
        assert list(summaries[0][kind].values()) == list(summaries[1][kind].values())
    assert summaries[0]["per_class"] == summaries[1]["per_class"]


def test_one_class_is_evaluated_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, 1,000 images with 100 instances of 80 classes take 1.1 GB; so they take 0.1."""
    evaluated: list[tuple[list[int], int]] = []

    class Recorded(COCOeval):
        def accumulate(self, p: Any = None) -> None:
            evaluated.append((self.params.catIds, len(self.evalImgs)))
            super().accumulate(p)

    monkeypatch.setattr("solov2.evaluation.curves.COCOeval", Recorded)
    dataset, image_ids, results = scene()
    evaluator = CocoEvaluator(load(dataset), CATEGORY_IDS)
    evaluator.update(image_ids, results)
    evaluator.summarize()
    assert [classes for classes, _ in evaluated] == [[3], [3], [7], [7], [90], [90]]  # masks and boxes; 91 has no truth
    assert all(images <= 4 * len(image_ids) for _, images in evaluated)


def test_images_beyond_the_limits_are_named() -> None:
    coco, _ = crowd(256)
    for limits, named in (
        ((100, 100), True),
        ((300, 100), True),
        ((100, 0), True),
        ((300, 256), False),
        ((256, 0), False),
    ):
        warning = limit_warning(coco, *limits)
        assert (warning is not None) == named, limits
        assert warning is None or all(part in warning for part in ("1 image", "cells.png (256)", "max_detections"))
    coco.dataset["annotations"][0]["iscrowd"] = 1
    assert limit_warning(coco, 255, 0) is None


def test_limits_are_suggested_from_the_data() -> None:
    config = load_config("solov2_r50_fpn_1x")
    assert suggest_limits(100, config) == {}
    wanted = {"model": {"max_instances": 300, "max_candidates": 600}, "data": {"max_detections": 300}}
    assert suggest_limits(256, config) == wanted
    raised = load_config("solov2_r50_fpn_1x", ["data.max_detections=300", "model.max_instances=0"])
    assert suggest_limits(256, raised) == {}
    with pytest.raises(InputError, match="max_detections must be an integer from 100"):
        load_config("solov2_r50_fpn_1x", ["data.max_detections=50"])


def test_file_without_ground_truth() -> None:
    dataset, image_ids, results = scene(images=1)
    evaluator = CocoEvaluator(load({**dataset, "annotations": []}), CATEGORY_IDS)
    evaluator.update(image_ids, results)
    assert set(evaluator.summarize()["segm"].values()) == {-1.0}


def test_only_requested_images_count() -> None:
    dataset, image_ids, results = scene()
    subset = image_ids[4:7]
    evaluator = CocoEvaluator(load(dataset), CATEGORY_IDS, image_ids=subset)
    evaluator.update(image_ids, results)
    assert {entry["image_id"] for entry in evaluator.results()} == set(subset)
    small = {
        **dataset,
        "images": [image for image in dataset["images"] if image["id"] in subset],
        "annotations": [entry for entry in dataset["annotations"] if entry["image_id"] in subset],
    }
    assert evaluator.summarize()["segm"] == plain_figures(load(small), evaluator.results(), "segm")


def test_per_class_ap_averages_to_ap() -> None:
    dataset, image_ids, results = scene()
    evaluator = CocoEvaluator(load(dataset), CATEGORY_IDS)
    evaluator.update(image_ids, results)
    summary = evaluator.summarize(per_class=True)
    for kind in ("segm", "bbox"):
        seen = [summary["per_class"][name][f"{kind}_AP"] for name in ("disc", "square", "ring")]
        assert np.mean(seen) == pytest.approx(summary[kind]["AP"], abs=1e-12)
        assert len(set(seen)) == 3


def test_rle_masks_give_the_same_results_as_bool_masks() -> None:
    dataset, image_ids, results = scene(images=3)
    planes, runs = (CocoEvaluator(load(dataset), CATEGORY_IDS) for _ in range(2))
    planes.update(image_ids, results)
    encoded = [{**result, "masks": encode_rle(result["masks"])} for result in results]
    for result in encoded[0]["masks"]:
        result["counts"] = result["counts"].encode()  # as pycocotools itself returns them
    runs.update(image_ids, encoded)
    assert runs.results() == planes.results()


def test_results_are_json_with_the_ids_of_the_file() -> None:
    dataset, image_ids, results = scene(images=2)
    evaluator = CocoEvaluator(load(dataset), CATEGORY_IDS)
    evaluator.update(image_ids, results)
    entries = json.loads(json.dumps(evaluator.results()))
    assert entries == evaluator.results()
    assert [set(entry) for entry in entries] == [{"image_id", "category_id", "segmentation", "score"}] * 14
    assert [entry["category_id"] for entry in entries[:7]] == [(3, 7, 90)[i] for i in results[0]["labels"].tolist()]
    assert entries[0]["score"] == float(results[0]["scores"][0])  # not rounded
    x0, y0, x1, y1 = results[0]["boxes"][0].tolist()
    assert evaluator.box_results()[0]["bbox"] == [x0, y0, x1 - x0, y1 - y0]


def test_the_callers_annotations_are_not_changed(capsys: pytest.CaptureFixture[str]) -> None:
    dataset, image_ids, results = scene(images=2)
    coco = load(dataset)
    evaluator = CocoEvaluator(coco, CATEGORY_IDS)
    evaluator.update(image_ids, results)
    first, second = evaluator.summarize(), evaluator.summarize()
    assert first == second
    assert coco.dataset == dataset
    assert capsys.readouterr().out == ""


def test_annotations_without_area_box_and_iscrowd() -> None:
    dataset, image_ids, results = scene()
    keys = ("id", "image_id", "category_id", "segmentation")
    bare = {**dataset, "annotations": [{key: entry[key] for key in keys} for entry in dataset["annotations"]]}
    whole, lean = CocoEvaluator(load(dataset), CATEGORY_IDS), CocoEvaluator(load(bare), CATEGORY_IDS)
    for evaluator in (whole, lean):
        evaluator.update(image_ids, results)
    assert lean.summarize() == whole.summarize()


def test_errors_name_the_mistake(caplog: pytest.LogCaptureFixture) -> None:
    dataset, image_ids, results = scene(images=2)
    evaluator = CocoEvaluator(load(dataset), CATEGORY_IDS)
    with pytest.raises(InputError, match="image id 999 "):
        evaluator.update([999], results[:1])
    with pytest.raises(InputError, match="image id 999 "):
        evaluator.merge([{999: []}])
    with pytest.raises(InputError, match="image id 999 "):
        CocoEvaluator(load(dataset), CATEGORY_IDS, image_ids=[999])
    with pytest.raises(InputError, match="category id 5 "):
        CocoEvaluator(load(dataset), [3, 5])
    with pytest.raises(InputError, match="label 2 of image .* has no category"):
        CocoEvaluator(load(dataset), [3, 7]).update(image_ids, results)
    dataset["annotations"][0]["id"] = 0
    CocoEvaluator(load(dataset), CATEGORY_IDS)
    assert "annotation id 0" in caplog.text


def test_table() -> None:
    dataset, image_ids, results = scene()
    evaluator = CocoEvaluator(load(dataset), CATEGORY_IDS)
    evaluator.update(image_ids, results)
    summary = evaluator.summarize(per_class=True)
    rows = {line.split()[0]: line.split()[1:] for line in format_table(summary).splitlines() if line.strip()}
    assert rows["AP"] == [f"{100 * summary['segm']['AP']:.1f}", f"{100 * summary['bbox']['AP']:.1f}"]
    assert set(FIGURES) <= set(rows)
    assert rows["unseen"] == ["-", "-"]
    assert "ring" not in format_table(evaluator.summarize())
