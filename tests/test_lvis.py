"""The rules of LVIS: each on its own, and all together with the figures of the LVIS API."""

from __future__ import annotations

import contextlib
import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.scenes import SIZE, as_predictions, rle
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

from solov2.errors import InputError
from solov2.evaluation.coco import CocoEvaluator, format_table
from solov2.evaluation.lvis import require_lvis

pytest.importorskip("faster_coco_eval")
SQUARES = [rle(y, x) for y in (4, 54) for x in (4, 54)]


def dataset(instances: list[tuple[int, int, dict[str, Any]]], images: int = 3, classes: int = 3) -> dict[str, Any]:
    """Annotations (image, class, mask); class 1 is rare, 2 common and 3 frequent, and so on."""
    annotations = []
    for number, (image, category, mask) in enumerate(instances, 1):
        compressed = {**mask, "counts": mask["counts"].encode()}
        annotations.append(
            {"id": number, "image_id": image, "category_id": category, "segmentation": mask, "iscrowd": 0,
             "area": int(mask_api.area(compressed)), "bbox": mask_api.toBbox(compressed).tolist()}
        )  # fmt: skip
    return {
        "info": {},
        "images": [
            {"id": i, "height": SIZE, "width": SIZE, "neg_category_ids": [], "not_exhaustive_category_ids": []}
            for i in range(1, images + 1)
        ],
        "categories": [{"id": i, "name": f"c{i}", "frequency": "rcf"[i % 3 - 1]} for i in range(1, classes + 1)],
        "annotations": annotations,
    }


def index(content: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = copy.deepcopy(content)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def entry(image: int, category: int, mask: dict[str, Any], score: float) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "segmentation": mask, "score": score}


def evaluated(content: dict[str, Any], results: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    coco = index(content)
    evaluator = CocoEvaluator(coco, sorted(coco.cats), lvis=True, **options)
    evaluator.update(*as_predictions(results, sorted(coco.cats)))
    return evaluator.summarize(per_class=True)


def test_a_class_counts_only_where_it_is_annotated() -> None:
    """A false positive of class 1 before its true positive halves the AP, on images that say the class is absent."""
    content = dataset([(1, 1, SQUARES[0]), (2, 2, SQUARES[0]), (3, 3, SQUARES[0])])
    results = [entry(1, 1, SQUARES[0], 0.5), entry(2, 1, SQUARES[1], 0.9), entry(3, 3, SQUARES[0], 0.5)]
    unknown = evaluated(content, results)
    assert unknown["per_class"]["c1"]["segm_AP"] == pytest.approx(0.5)  # by the rules of COCO
    assert unknown["lvis"]["per_class"]["c1"] == {"segm_AP": 1.0, "bbox_AP": 1.0}
    figures = unknown["lvis"]["segm"]
    assert [figures[name] for name in ("APr", "APc", "APf")] == [1.0, 0.0, 1.0]
    assert figures["AP"] == pytest.approx(2 / 3)
    content["images"][1]["neg_category_ids"] = [1]
    absent = evaluated(content, results)
    assert absent["lvis"]["per_class"]["c1"]["segm_AP"] == absent["lvis"]["segm"]["APr"] == pytest.approx(0.5)


def test_unmatched_predictions_of_a_class_that_is_not_exhaustive_are_ignored() -> None:
    content = dataset([(1, 1, SQUARES[0])], images=1)
    results = [entry(1, 1, SQUARES[0], 0.5), entry(1, 1, SQUARES[1], 0.9)]
    assert evaluated(content, results)["lvis"]["segm"]["APr"] == pytest.approx(0.5)
    content["images"][0]["not_exhaustive_category_ids"] = [1]
    summary = evaluated(content, results)
    assert summary["lvis"]["segm"]["APr"] == summary["lvis"]["bbox"]["APr"] == 1.0
    assert summary["segm"]["AP"] == pytest.approx(0.5)
    assert summary["lvis"]["segm"]["APc"] == summary["lvis"]["segm"]["APf"] == -1.0


@pytest.mark.parametrize(("others", "expected"), [(299, 1.0), (300, 0.0)])
def test_300_predictions_count_per_image_all_classes_together(others: int, expected: float) -> None:
    content = dataset([(1, 1, SQUARES[0]), (2, 1, SQUARES[0])], images=2)
    content["annotations"] = content["annotations"][:1]
    crowd = [entry(1, 2 + number % 2, SQUARES[1], 0.9) for number in range(others)]
    results = [*crowd, entry(1, 1, SQUARES[0], 0.5), *(entry(2, 3, SQUARES[1], 0.9) for _ in range(5))]
    summary = evaluated(content, results)
    assert summary["lvis"]["segm"]["AP"] == expected
    assert summary["segm"]["AP"] == pytest.approx(1.0)


def scene(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Seven classes on six images, with imperfect results: 380 of the first image, 30 of each other one."""
    random = np.random.RandomState(seed)
    places, instances, results = {}, [], []
    for image in range(1, 7):
        present = random.choice(7, 3, replace=False) + 1
        absent = random.choice([c for c in range(1, 8) if c not in present], 2, replace=False)
        boxes = [[*random.randint(0, 70, 2), *random.randint(5, 50, 2)] for _ in range(5)]
        classes = random.choice(present, 5).tolist()
        instances += [(image, category, rle(*box)) for box, category in zip(boxes, classes)]
        places[image] = absent.tolist(), random.choice(present, 1).tolist()
        for _ in range(380 if image == 1 else 30):
            chosen = random.randint(5)
            box = np.maximum(np.array(boxes[chosen]) + random.randint(-4, 5, 4), [0, 0, 2, 2])
            category = classes[chosen] if random.rand() < 0.6 else random.randint(1, 8)
            results.append(entry(image, int(category), rle(*box.tolist()), float(np.round(random.rand(), 2))))
    content = dataset(instances, images=6, classes=7)
    for image in content["images"]:
        image["neg_category_ids"], image["not_exhaustive_category_ids"] = places[image["id"]]
    return content, results


# lvis 0.5.3 (PyPI): LVISEval(LVIS(file), LVISResults(LVIS(file), results), "segm").run(), with numpy.float = float
RECORDED = {
    0: {
        "AP": 0.2531790444320549,
        "AP50": 0.5394315343592283,
        "AP75": 0.15410354901036322,
        "AP_small": 0.25521046477760695,
        "AP_medium": 0.5891980198019802,
        "AP_large": -1.0,
        "APr": 0.21367536736575118,
        "APc": 0.3411692597831212,
        "APf": 0.20469250614729242,
        "AR300": 0.5512962962962963,
        "AR_small": 0.5063888888888889,
        "AR_medium": 0.78,
        "AR_large": -1.0,
    },
    1: {
        "AP": 0.17227122382672588,
        "AP50": 0.3519857619377355,
        "AP75": 0.1736646076169308,
        "AP_small": 0.16585894822160052,
        "AP_medium": 0.5904025223950966,
        "AP_large": -1.0,
        "APr": 0.24108060930162495,
        "APc": 0.1395723531014219,
        "APf": 0.10175601633968132,
        "AR300": 0.5408163265306123,
        "AR_small": 0.5166666666666667,
        "AR_medium": 0.7125,
        "AR_large": -1.0,
    },
}


@pytest.mark.parametrize("seed", RECORDED)
def test_figures_are_those_of_the_lvis_api(seed: int) -> None:
    summary = evaluated(*scene(seed), boundary=True)["lvis"]
    assert summary["segm"] == pytest.approx(RECORDED[seed], rel=0, abs=1e-12)
    assert list(summary["segm"]) == list(RECORDED[seed])
    assert summary["boundary"].keys() == summary["bbox"].keys() == summary["segm"].keys()
    assert summary["boundary"]["AP"] < summary["segm"]["AP"] and summary["max_detections"] == 300


def test_a_file_that_lacks_what_the_rules_need_is_named() -> None:
    content = dataset([(1, 1, SQUARES[0])])
    for section, key, values in (
        ("images", "neg_category_ids", (None, 3, ["1"])),
        ("images", "not_exhaustive_category_ids", (None, {})),
        ("categories", "frequency", (None, "x", ["r"])),
    ):
        for value in values:
            wrong = copy.deepcopy(content)
            wrong[section][1][key] = value
            with pytest.raises(InputError, match=rf"(?=.* 2 of gt\.json)(?=.*{key}).*--lvis"):
                require_lvis(index(wrong), Path("gt.json"))
            with pytest.raises(InputError, match=key):
                CocoEvaluator(index(wrong), [1], lvis=True)
    require_lvis(index(content), Path("gt.json"))


def test_the_table_has_both_kinds_of_figures() -> None:
    content = dataset([(1, 1, SQUARES[0])])
    rows = [line.split() for line in format_table(evaluated(content, [entry(1, 1, SQUARES[0], 0.5)])).split("\n")]
    assert [row[0] for row in rows if row and row[0][:2] in ("AP", "AR")].count("AP") == 2
    assert ["APr", "100.0", "100.0"] in rows and ["APc", "-", "-"] in rows and ["AR300", "100.0", "100.0"] in rows
    assert rows.count(["class", "mask", "AP", "box", "AP"]) == 2
