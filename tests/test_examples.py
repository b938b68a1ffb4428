"""The examples for users of exported files, which need neither torch nor the library, against the library."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers.tiny_models import lively
from helpers.tiny_runs import tiny_config
from PIL import Image

from solov2.build import construct
from solov2.export.check import load_image, model_results
from solov2.export.files import file_metadata, save_program
from solov2.export.graph import export_program, select_instances
from solov2.models.panoptic import postprocess_panoptic
from solov2.models.solov2 import SOLOv2
from solov2.ops.masks import decode_rle
from solov2.ops.merge import merge_segments
from solov2.settings import PanopticSettings, PostprocessSettings

GRIDS = (8, 6, 5, 4, 3)


@pytest.fixture(scope="module")
def example(repo_root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("panoptic_merge", repo_root / "examples/panoptic_merge.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not {"torch", "solov2", "F"} & vars(module).keys()
    return module


def random_raw(seed: int, height: int, width: int) -> dict[str, torch.Tensor | list[torch.Tensor]]:
    """Raw outputs of two images, smooth, in which things of all scores and six kinds of stuff are found."""
    generator = torch.Generator().manual_seed(seed)

    def smooth(channels: int, size: tuple[int, int], factor: float) -> torch.Tensor:
        coarse = factor * torch.randn(2, channels, 4, 5, generator=generator)
        return torch.nn.functional.interpolate(coarse, size, mode="bicubic")

    return {
        "category_logits": [smooth(3, (side, side), 2) for side in GRIDS],
        "kernels": [smooth(8, (side, side), 1) for side in GRIDS],
        "mask_features": smooth(8, (height // 4, width // 4), 2),
        "semantic_logits": smooth(7, (height // 4, width // 4), 3),
    }


@pytest.mark.parametrize("score_threshold", [0.0, 0.3])
@pytest.mark.parametrize("sizes", [[(150, 192), (160, 131)], [(160, 192), (97, 192)]])
def test_exported_outputs_give_the_segments_of_the_library(
    example: ModuleType, sizes: list[tuple[int, int]], score_threshold: float
) -> None:
    raw, originals = random_raw(1, 160, 192), [(211, 270), (101, 83)]
    settings = PostprocessSettings(area_thresholds=(1,) * 5, score_threshold=0.1, max_instances=30)
    limits = PanopticSettings(panoptic_score_threshold=score_threshold, stuff_area_limit=300)
    exported = {name: values.numpy() for name, values in select_instances(raw, settings).items()}
    outputs = zip(*exported.values(), raw["semantic_logits"].numpy(), sizes, originals)
    results = postprocess_panoptic(raw, sizes, originals, settings, limits)
    names, kinds = ("id", "label", "is_thing", "instance", "area"), set()
    for image, wanted in zip(outputs, results, strict=True):
        found, segments = example.panoptic(*image, score_threshold=score_threshold, stuff_area_limit=300)
        assert found.dtype == np.int32 and (found == wanted["panoptic_map"].numpy()).mean() >= 0.999
        assert len(segments) == len(wanted["segments"])
        for one, other in zip(segments, wanted["segments"]):
            assert all(one[name] == other[name] for name in names[:4])
            assert abs(one["area"] - other["area"]) <= 2
            assert one["score"] == (other["score"] and pytest.approx(other["score"], abs=1e-5))
        kinds |= {segment["is_thing"] for segment in segments}
    assert kinds == {True, False}


def test_whole_numbers_merge_alike_in_every_pixel(example: ModuleType) -> None:
    """Small rectangles: equal scores, empty masks, shares and areas right at the limits."""
    rng, total = np.random.default_rng(0), 0
    for _ in range(500):
        height, width, count, stuff = (int(rng.integers(low, high)) for low, high in ((1, 9), (1, 9), (0, 8), (1, 5)))
        masks = np.zeros((count, height, width), dtype=bool)
        for mask in masks:
            y, x, h, w = (int(rng.integers(0, high)) for high in (height, width, height + 1, width + 1))
            mask[y : y + h, x : x + w] = True
        scores, labels = -np.sort(-rng.choice([0.1, 0.3, 0.9], count).astype(np.float32)), rng.integers(0, 3, count)
        semantic = rng.integers(0, stuff + 1, (height, width)).astype(np.uint8)
        limits = {"overlap_threshold": float(rng.choice([0, 1 / 3, 0.5, 1])), "stuff_area_limit": int(rng.integers(12))}
        good = scores >= 0.3
        found, segments = example.merge(scores[good], labels[good], masks[good], semantic, stuff, **limits)
        instances = {"scores": scores, "labels": labels, "masks": masks}
        tensors = {name: torch.from_numpy(values) for name, values in instances.items()}
        wanted = merge_segments(tensors, torch.from_numpy(semantic), stuff, score_threshold=0.3, **limits)
        assert (found == wanted["panoptic_map"].numpy()).all()
        assert segments == [{key: s[key] for key in segment} for segment, s in zip(segments, wanted["segments"])]
        assert len(segments) == len(wanted["segments"])
        total += len(segments)
    assert total > 900


def test_the_page_shows_the_merge_of_the_example(repo_root: Path) -> None:
    page, source = (repo_root / path for path in ("docs/export.md", "examples/panoptic_merge.py"))
    [shown] = re.findall(r"^```python\n(panoptic_map = .*?)^```$", page.read_text(), re.M | re.S)
    assert textwrap.indent(shown, "    ") in source.read_text()


SIZE = (64, 96)
# Runs an example in a process that cannot import torch or the library, and saves the instances of its images.
WITHOUT_TORCH = """
import json, sys
import numpy as np
sys.modules.update(torch=None, torchvision=None, solov2=None, cv2=None, pycocotools=None)
sys.path.insert(0, "{examples}")
example = __import__("{name}")
opened = example.open_file("{file}")
for number, path in enumerate({images}):
    found = example.predict(opened, path, score_threshold=0.0)
    masks = np.array([instance["mask"] for instance in found])
    scores, labels, names = ([instance[key] for instance in found] for key in ("score", "label", "name"))
    np.savez(f"{folder}/{{number}}.npz", scores=scores, labels=labels, names=names, masks=masks)
    json.dumps(example.describe(found))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[SOLOv2, Path]:
    """A tiny model that finds something, and its file."""
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = lively(construct(tiny_config("model.max_instances=20").model, ["cat", "dog", "owl", "cow"])).eval()
    path = tmp_path_factory.mktemp("exported") / "tiny.onnx"
    save_program(export_program(model, SIZE), path, file_metadata(model))
    return model, path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Smooth pictures: wide, high and turned by EXIF, small."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    files = [folder / name for name in ("wide.png", "turned.jpg", "small.png")]
    for file, size in zip(files, [(130, 70), (110, 90), (40, 44)]):
        picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        exif = picture.getexif()
        exif[274] = 6 if file.suffix == ".jpg" else 1  # orientation
        picture.save(file, exif=exif)
    return files


@pytest.mark.parametrize(
    ("name", "runtime"), [("onnxruntime_predict", "onnxruntime"), ("openvino_predict", "openvino")]
)
def test_scripts_without_torch_find_what_the_library_finds(
    name: str, runtime: str, exported: tuple[SOLOv2, Path], images: list[Path], repo_root: Path, tmp_path: Path
) -> None:
    pytest.importorskip(runtime)
    model, file = exported
    places = {"examples": repo_root / "examples", "name": name, "file": file, "folder": tmp_path}
    code = WITHOUT_TORCH.format(**places, images=[str(image) for image in images])
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    for number, image in enumerate(images):
        found = np.load(tmp_path / f"{number}.npz")
        wanted = model_results(model, load_image(image, SIZE, model.input_scale))
        assert len(wanted["scores"]) >= 10 and found["labels"].tolist() == wanted["labels"].tolist()
        assert np.allclose(found["scores"], wanted["scores"].numpy(), atol=1e-3)
        assert found["names"].tolist() == [model.class_names[label] for label in wanted["labels"]]
        masks = np.array([decode_rle(mask).numpy() for mask in wanted["masks"]])
        assert found["masks"].shape == masks.shape and (found["masks"] == masks).mean() >= 0.999


def test_the_server_answers_and_refuses(
    exported: tuple[SOLOv2, Path], images: list[Path], repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("fastapi")
    pytest.importorskip("httpx")
    from fastapi.testclient import TestClient

    monkeypatch.setenv("MODEL", str(exported[1]))
    monkeypatch.syspath_prepend(repo_root / "examples")
    import server

    monkeypatch.setattr(server, "MAX_BYTES", 30_000)
    monkeypatch.setattr(server, "MAX_PIXELS", 130 * 70)
    client = TestClient(server.app)
    answer = client.post("/predict", content=images[0].read_bytes())
    assert answer.status_code == 200 and isinstance(answer.json(), list)
    assert client.post("/predict", content=b"no image").status_code == 400
    assert client.post("/predict", content=images[1].read_bytes()).status_code == 413  # pixels
    assert client.post("/predict", content=bytes(30_001)).status_code == 413


def test_the_page_shows_the_resize_of_the_example(repo_root: Path) -> None:
    page, source = (repo_root / path for path in ("docs/export.md", "examples/detections.py"))
    [shown] = re.findall(r"^(def resize\(.*?)^```$", page.read_text(), re.M | re.S)
    assert shown in source.read_text()
