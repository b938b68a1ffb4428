"""`eval --predictions FILE`: equal to pycocotools on that file, without images; and what is wrong with a file."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.coco_files import CocoTree
from helpers.scenes import SIZE, plant, scene
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from solov2.commands.main import main
from solov2.errors import InputError
from solov2.evaluation.curves import FIGURES
from solov2.evaluation.results_file import evaluate_results


def faulty_results(coco: COCO, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for kind in ("localization", "duplicate", "background", "missed"):
        results = plant(kind, coco, results)
    return results


def with_boxes(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Boxes that are not those of the masks: larger, and not in whole pixels."""
    return [
        {**entry, "bbox": [x - 0.1, y + 0.2, 5.1 * width + 0.3, 1.7 * height]}
        for entry in results
        for x, y, width, height in [mask_api.toBbox(compressed(entry["segmentation"])).tolist()]
    ]


def compressed(mask: dict[str, Any]) -> dict[str, Any]:
    return {**mask, "counts": mask["counts"].encode()}


def as_lengths(mask: dict[str, Any]) -> dict[str, Any]:
    """The RLE with a list of run lengths."""
    pixels = mask_api.decode(compressed(mask)).ravel(order="F")
    lengths, value = [0], 0
    for pixel in pixels.tolist():
        if pixel != value:
            lengths.append(0)
            value = pixel
        lengths[-1] += 1
    return {"size": mask["size"], "counts": lengths}


def as_polygons(mask: dict[str, Any]) -> list[list[float]]:
    x, y, width, height = mask_api.toBbox(compressed(mask)).tolist()
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def reencoded(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With boxes, pycocotools also takes polygons and uncompressed RLE."""
    forms = (as_lengths, as_polygons, dict)
    return [
        {**entry, "segmentation": forms[number % 3](entry["segmentation"])}
        for number, entry in enumerate(with_boxes(results))
    ]


def extra_keys(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"id": 7, "area": -1, **entry} for entry in results]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, list[dict[str, Any]]]:
    coco, results = scene(5)
    truth, found = tmp_path / "gt.json", tmp_path / "results.json"
    truth.write_text(json.dumps(coco.dataset))
    results = faulty_results(coco, results)
    found.write_text(json.dumps(results))
    return truth, found, results


def plain_figures(truth: Path, found: Path, kind: str) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        evaluation = COCOeval(coco, coco.loadRes(str(found)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(FIGURES, evaluation.stats.tolist(), strict=True))


@pytest.mark.parametrize("change", [list, with_boxes, reencoded, extra_keys])
def test_figures_are_pycocotools(change: Any, files: Any, tmp_path: Path) -> None:
    truth, found, results = files
    found.write_text(json.dumps(change(results)))
    figures = tmp_path / "figures.json"
    assert main(["eval", "--predictions", str(found), "--val-annotations", str(truth), "--json", str(figures)]) == 0
    report = json.loads(figures.read_text())
    assert 0.2 < report["segm"]["AP"] < 0.8
    for kind in ("segm", "bbox"):
        assert report[kind] == plain_figures(truth, found, kind)
    assert {key: report[key] for key in ("predictions", "annotations", "images", "max_detections")} == {
        "predictions": str(found),
        "annotations": str(truth),
        "images": 12,
        "max_detections": 100,
    }
    assert "weights" not in report


def test_options_of_the_command(files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder of the data, classes, more detections, and faster-coco-eval."""
    truth, found, results = files
    content = json.loads(truth.read_text())
    words = ["--set", "data.max_detections=200", "--per-class", "--json", "-"]
    (tmp_path / "annotations").mkdir()
    truth.rename(tmp_path / "annotations/instances_train2017.json")
    words += ["--predictions", str(found), "--data-root", str(tmp_path), "--split", "train", "--classes", "c3,c1"]
    assert main(["eval", *words]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert list(report["per_class"]) == ["c1", "c3"] and "AR200" in report["segm"] and "c3" in err
    pytest.importorskip("faster_coco_eval")
    for number, image in enumerate(content["images"]):
        image |= {"neg_category_ids": [number % 3 + 1], "not_exhaustive_category_ids": []}
    for category, frequency in zip(content["categories"], "rcf"):
        category["frequency"] = frequency
    truth.write_text(json.dumps(content))
    words = ["--predictions", str(found), "--val-annotations", str(truth), "--fast", "--boundary", "--lvis"]
    assert main(["eval", "quickstart", *words, "--json", "-"]) == 0
    fast = json.loads(capsys.readouterr().out)
    assert fast["bbox"] == pytest.approx(plain_figures(truth, found, "bbox"), rel=0, abs=5e-16)
    assert 0 < fast["boundary"]["AP"] <= fast["segm"]["AP"] <= fast["lvis"]["segm"]["AP"]
    assert fast == {
        "predictions": str(found),
        "annotations": str(truth),
        **evaluate_results(found, truth, backend="faster-coco-eval", boundary=True, lvis=True),
    }


def test_the_instances_that_eval_writes(tmp_path: Path) -> None:
    tree = CocoTree(tmp_path)
    tree.file.write_text(json.dumps(tree.content))
    results, figures = tmp_path / "results.json", [tmp_path / "model.json", tmp_path / "file.json"]
    data = ["--val-annotations", str(tree.file), "--set", "data.shapes=false"]
    small = ["--set", "model.input_scale=[64,64]", "--workers", "0", "--device", "cpu"]
    oracle = ["--oracle", "--val-images", str(tree.images), "--results", str(results), *small]
    assert main(["eval", "quickstart", *data, *oracle, "--json", str(figures[0])]) == 0
    for image in tree.images.iterdir():
        image.unlink()
    assert main(["eval", "quickstart", *data, "--predictions", str(results), "--json", str(figures[1])]) == 0
    model, file = (json.loads(path.read_text()) for path in figures)
    assert model["segm"] == file["segm"] and model["segm"]["AP"] > 0 and model["bbox"]["AP"] == file["bbox"]["AP"]


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown image": ({"image_id": 99}, "image_id 99"),
    "image as text": ({"image_id": "1"}, "image_id"),
    "unknown category": ({"category_id": 0}, "category_id 0"),
    "no category": ({"category_id": None}, "category_id"),
    "score is not a number": ({"score": float("nan")}, "score"),
    "infinite score": ({"score": float("inf")}, "score"),
    "score as text": ({"score": "0.5"}, "score"),
    "no mask": ({"segmentation": None, "bbox": [1, 2, 3, 4]}, "segmentation.*a box is not enough"),
    "size of another image": ({"segmentation": {"size": [5, 5], "counts": "T"}}, r"\[5, 5\]"),
    "short counts": ({"segmentation": {"size": [SIZE, SIZE], "counts": [3, 4]}}, "counts"),
    "counts are not RLE": ({"segmentation": {"size": [SIZE, SIZE], "counts": "~~~"}}, "counts"),
    "odd polygon": ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "polygon"),
    "a single box": ({"bbox": [1, 2, 3, 4]}, "bbox"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faulty_rows_are_named(name: str, files: Any) -> None:
    truth, found, results = files
    change, named = FAULTS[name]
    results[3] = {**results[3], **change}
    found.write_text(json.dumps(results))
    with pytest.raises(InputError, match=rf"(?s)row 4 of {found} .*{named}"):
        evaluate_results(found, truth)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[7]", "row 1 of"),
        ("{}", "results file .* list"),
        ('{"annotations": [{"segments_info": []}]}', "panoptic-quality"),
        ("[{", "results file .* not valid JSON"),
        (None, "results file .* does not exist"),
        ('[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]', "row 1 of .* box is not enough"),
    ],
)
def test_files_of_other_kinds(content: str | None, named: str, files: Any) -> None:
    truth, found, _ = files
    found.unlink() if content is None else found.write_text(content)
    with pytest.raises(InputError, match=named):
        evaluate_results(found, truth)


def test_a_file_without_predictions_has_ap_0(files: Any) -> None:
    truth, found, _ = files
    found.write_text("[]")
    assert evaluate_results(found, truth)["segm"]["AP"] == 0.0


def test_what_the_command_refuses(files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, found, _ = files
    words = ["eval", "--predictions", str(found), "--val-annotations", str(truth)]
    panoptic = tmp_path / "panoptic.json"
    panoptic.write_text('{"images": [], "categories": [], "annotations": [{"segments_info": []}]}')
    for more, named in (
        (["--weights", "x.pth"], "--weights"),
        (["--oracle"], "--oracle"),
        (["--tta", "flip"], "--tta"),
        (["--results", "x.json"], "--results"),
        (["--nproc", "2"], "--nproc"),
        (["--config", "quickstart_panoptic"], "panoptic-quality"),
        (["--val-annotations", str(panoptic)], "panoptic-quality"),
        (["--val-annotations", "missing.json"], "--val-annotations"),
        (["--predictions", "missing.json"], "--predictions"),
        (["--json", str(truth), "--overwrite"], f"replace the input {truth}"),
        (["--json", str(found), "--overwrite"], f"replace the input {found}"),
        (["--lvis"], "neg_category_ids"),
        (["--classes", "c9"], "no class 'c9'"),
    ):
        assert main([*words, *more]) == 2
        out, err = capsys.readouterr()
        assert out == "" and "error: " in err and named in err, err
    for flag in ("--boundary", "--lvis"):
        assert main(["eval", "quickstart_panoptic", "--oracle", "--data-root", str(tmp_path), flag]) == 2
        assert flag in capsys.readouterr().err
