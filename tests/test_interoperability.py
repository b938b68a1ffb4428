"""Results in other libraries: the code blocks of docs/interoperability.md run, and the metrics agree."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import lively, save_content

import solov2
from solov2.config import load_config
from solov2.data.coco import CocoInstances
from solov2.data.shapes import CLASSES, generate_shapes
from solov2.errors import InputError
from solov2.evaluation.coco import CocoEvaluator
from solov2.ops.masks import encode_rle, masks_to_boxes


def a_result(count: int = 3, size: tuple[int, int] = (20, 30)) -> dict[str, Any]:
    """A result as `SOLOv2.predict` returns it, of rectangles."""
    masks = torch.zeros(count, *size, dtype=torch.bool)
    for index, mask in enumerate(masks):
        mask[2 + index : 9 + index, 3 : 12 + 2 * index] = True
    scores = torch.linspace(0.9, 0.4, count)
    return {"scores": scores, "labels": torch.arange(count) % 2, "masks": masks, "boxes": masks_to_boxes(masks)}


@pytest.mark.parametrize("count", [0, 3])
def test_supervision_gets_every_field(count: int) -> None:
    pytest.importorskip("supervision")
    result = a_result(count)
    detections = solov2.to_supervision(result, ["cat", "dog"])
    assert len(detections) == count
    assert np.array_equal(detections.xyxy, result["boxes"].numpy()) and detections.xyxy.dtype == np.float32
    assert np.array_equal(detections.confidence, result["scores"].numpy())
    assert np.array_equal(detections.class_id, result["labels"].numpy())
    assert np.array_equal(detections.mask, result["masks"].numpy()) and detections.mask.dtype == bool
    assert detections.data["class_name"].tolist() == ["cat", "dog", "cat"][:count]
    assert "class_name" not in solov2.to_supervision(result).data


def test_supervision_gets_decoded_rles() -> None:
    pytest.importorskip("supervision")
    planes, nothing = a_result(), a_result(0)
    detections = solov2.to_supervision(planes | {"masks": encode_rle(planes["masks"])})
    assert np.array_equal(detections.mask, planes["masks"].numpy()) and detections.mask.dtype == bool
    empty = solov2.to_supervision(nothing | {"masks": []}, ["cat", "dog"])
    assert len(empty) == 0 and empty.mask is None and len(empty.data["class_name"]) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_supervision_gets_results_from_a_gpu() -> None:
    pytest.importorskip("supervision")
    result = {name: value.to("cuda") for name, value in a_result().items()}
    assert np.array_equal(solov2.to_supervision(result).mask, a_result()["masks"].numpy())


def test_a_label_without_a_name() -> None:
    pytest.importorskip("supervision")
    with pytest.raises(InputError, match="label 1 .* 1 class name"):
        solov2.to_supervision(a_result(), ["cat"])


def test_supervision_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(InputError, match="^to_supervision .*pip install supervision$"):
        solov2.to_supervision(a_result())


@pytest.fixture(scope="session")
def after_quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the quickstart leaves it, with fewer shapes and untrained weights that find something."""
    folder = tmp_path_factory.mktemp("quickstart")
    generate_shapes(folder / "data" / "shapes", train_images=1, val_images=6, size=192, seed=0)
    torch.manual_seed(0)
    model = lively(solov2.build_model("quickstart"))
    torch.nn.init.ones_(model.head.category_predictor.bias)  # scores above 0.3, the threshold for drawing
    content = {"model": model.state_dict(), "class_names": [*CLASSES]}
    (folder / "runs" / "quickstart").mkdir(parents=True)
    path = folder / "runs" / "quickstart" / "best.pth"
    save_content(path, content | {"config": load_config("quickstart").to_dict()})
    return folder


@pytest.mark.parametrize("library", ["torchvision", "torchmetrics", "pycocotools", "supervision"])
def test_code_block_of_a_library_runs(
    library: str, repo_root: Path, after_quickstart: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each runs after the first block, which makes the result they all use."""
    pytest.importorskip(library)
    text = (repo_root / "docs" / "interoperability.md").read_text(encoding="utf-8")
    first, *sections = text.split("\n## ")
    [own] = [section for section in sections if section.startswith(f"{library}\n")]
    [start], [block] = (re.findall(r"^```python\n(.*?)^```$", part, re.M | re.S) for part in (first, own))
    assert f"[{library}](#{library})" in first and len(sections) == 4
    monkeypatch.chdir(after_quickstart)
    names: dict[str, Any] = {}
    exec(compile(start, "docs/interoperability.md", "exec"), names)
    assert len(names["result"]["scores"]) > 1
    exec(compile(block, f"docs/interoperability.md, {library}", "exec"), names)

    picture = {"torchvision": "drawn", "supervision": "annotated"}.get(library)
    if picture is not None:
        drawn = torch.as_tensor(names[picture])
        image = torch.from_numpy(names["image"])
        assert drawn.dtype == torch.uint8 and sorted(drawn.shape) == sorted(image.shape) and not drawn.equal(image)
    elif library == "torchmetrics":
        assert -1 <= names["figures"]["map"] <= 1 and len(names["truth"]) == 6
    else:
        assert len(names["evaluation"].stats) == 12 and names["entries"]


def synthetic_detections(sample: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """Synthetic detections: masks shifted by up to two pixels, one in six of another class, random scores."""
    masks = [
        mask.roll(torch.randint(-2, 3, (2,), generator=generator).tolist(), (0, 1)) for mask in sample["masks"].bool()
    ]
    planes = torch.stack(masks) if masks else sample["masks"].bool()
    scores, order = torch.rand(len(planes), generator=generator).sort(descending=True)
    wrong = torch.rand(len(planes), generator=generator) < 1 / 6
    labels = torch.where(wrong, (sample["labels"] + 1) % len(CLASSES), sample["labels"])
    planes = planes[order]
    return {"scores": scores, "labels": labels[order], "masks": planes, "boxes": masks_to_boxes(planes)}


def test_torchmetrics_gives_the_same_metrics(tmp_path: Path) -> None:
    """On images without crowd regions, which torchmetrics would not know about."""
    detection = pytest.importorskip("torchmetrics.detection")
    generate_shapes(tmp_path / "shapes", train_images=20, val_images=1, size=128, seed=1)
    root = tmp_path / "shapes"
    data = CocoInstances(
        root / "annotations" / "instances_train2017.json", root / "train2017", training=True, keep_empty=True
    )
    crowded = {entry["image_id"] for entry in data.coco.dataset["annotations"] if entry["iscrowd"]}
    samples = [sample for sample in data if sample["image_id"] not in crowded]
    generator = torch.Generator().manual_seed(0)
    results = [synthetic_detections(sample, generator) for sample in samples]

    evaluator = CocoEvaluator(data.coco, data.category_ids, image_ids=[sample["image_id"] for sample in samples])
    evaluator.update([sample["image_id"] for sample in samples], results)
    ours = evaluator.summarize()["segm"]
    metric = detection.MeanAveragePrecision(iou_type="segm")
    metric.update(results, [{"labels": sample["labels"], "masks": sample["masks"].bool()} for sample in samples])
    theirs = metric.compute()

    same = {
        "AP": "map", "AP50": "map_50", "AP75": "map_75", "AP_small": "map_small", "AP_medium": "map_medium",
        "AP_large": "map_large", "AR1": "mar_1", "AR10": "mar_10", "AR100": "mar_100",
    }  # fmt: skip
    assert 0.2 < ours["AP"] < 0.9 and len(samples) >= 15
    for own, name in same.items():
        assert theirs[name].item() == pytest.approx(ours[own], abs=1e-6), name  # they are float32
