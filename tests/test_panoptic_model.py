"""Panoptic models: construction, prediction, training steps, checkpoints, and weights from and for instance models."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.coco_files import CocoTree
from helpers.panoptic_files import PanopticTree
from helpers.tiny_models import tiny_model, tiny_targets
from helpers.tiny_runs import random_batch, tiny_config
from torch import Tensor, nn

from solov2.build import build_criterion, build_model, construct
from solov2.checkpoint import Checkpoint
from solov2.compute import Compute
from solov2.config import Config, load_config
from solov2.convert import convert_state_dict, to_mmdet
from solov2.data.build import training_dataset, with_classes
from solov2.data.categories import COCO_CATEGORY_IDS, COCO_STUFF, COCO_STUFF_IDS
from solov2.errors import InputError
from solov2.losses import SOLOv2Criterion
from solov2.models.solov2 import SOLOv2
from solov2.predict import Predictor
from solov2.training.dry_run import saved_activation_bytes, synthetic_targets
from solov2.training.step import backward, count_targets, repeat_forward
from solov2.weights import read_checkpoint

PANOPTIC = {"num_stuff": 3, "semantic_channels": 32}
STUFF = ["road", "grass", "sky"]
CPU = torch.device("cpu")


def panoptic_model(variant: str = "basic blocks", **changes: Any) -> SOLOv2:
    return tiny_model(variant, **PANOPTIC, **changes)


def saved(model: SOLOv2, path: Path, **changes: Any) -> Path:
    """A checkpoint with the configuration that `model` was built from."""
    config = load_config("solov2_light_r18_fpn_3x").to_dict()
    shape = {"backbone_width": 8, "fpn_channels": 32, "tower_channels": 32, "tower_depth": 2, "num_classes": 3}
    shape |= {"mask_hidden_channels": 32, "mask_feature_channels": 32, "grid_sizes": [8, 6, 5, 4, 3]}
    config["model"] |= shape | (PANOPTIC if model.semantic_head is not None else {}) | changes
    stuff = (model.stuff_names or None, model.stuff_category_ids or None)
    Checkpoint(
        str(path), model.state_dict(), class_names=list("abc"), category_ids=[7, 8, 9], stuff_names=stuff[0],
        stuff_category_ids=stuff[1], config=config,
    ).save(path)  # fmt: skip
    return path


def instance_weights(model: SOLOv2) -> dict[str, Tensor]:
    return {name: x for name, x in model.state_dict().items() if not name.startswith("semantic_head.")}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("variant", ["basic blocks", "deformable everywhere", "nothing frozen, batch norm"])
def test_a_semantic_head_beside_an_unchanged_instance_model(variant: str) -> None:
    instance, model, images = tiny_model(variant), panoptic_model(variant), torch.randn(2, 3, 64, 96)
    assert_same(instance.state_dict(), instance_weights(model))  # the same initial weights for a seed
    with torch.no_grad():
        raw, wanted = model(images), instance(images)
    logits = raw.pop("semantic_logits")
    assert logits.shape == (2, 4, 16, 24) and raw.keys() == wanted.keys()
    assert torch.equal(raw["mask_features"], wanted["mask_features"])
    steps = [step for level in model.semantic_head.levels for step in level]
    assert {type(step.conv) for step in steps} == {nn.Conv2d} and len(steps) == 7
    assert {type(step.norm) for step in steps} == {type(model.mask_feature_head.predictor.norm)}
    optimized = model.optimize()(images)["semantic_logits"]
    torch.testing.assert_close(optimized, logits, rtol=0, atol=1e-4)
    assert model.optimize(precision="bf16")(images)["semantic_logits"].dtype == torch.bfloat16


def test_names_and_ids() -> None:
    model = panoptic_model()
    assert model.stuff_names == ["stuff 0", "stuff 1", "stuff 2"] and model.stuff_category_ids == [4, 5, 6]
    with torch.device("meta"):
        coco = build_model("solov2_light_r18_fpn_3x", num_stuff=53, device="meta")
    assert coco.stuff_names == list(COCO_STUFF) and coco.stuff_category_ids == list(COCO_STUFF_IDS)
    assert coco.stuff_names[-1] == "rug-merged" and dict(zip(COCO_STUFF_IDS, COCO_STUFF))[149] == "road"
    assert len({*COCO_STUFF}) == len({*COCO_STUFF_IDS, *COCO_CATEGORY_IDS}) - 80 == 53
    assert tiny_model().stuff_names == tiny_model().stuff_category_ids == []
    assert panoptic_model(stuff_names=STUFF).stuff_names == STUFF


def test_settings() -> None:
    with pytest.raises(InputError, match="semantic_channels must be a multiple of 32"):
        load_config("solov2_r50_fpn_1x", {"num_stuff": 53, "semantic_channels": 48})
    assert load_config("solov2_r50_fpn_1x", {"semantic_channels": 48}).model.num_stuff == 0
    with pytest.raises(InputError, match=r"num_stuff must be an integer from 0 to 254"):
        load_config("solov2_r50_fpn_1x", {"num_stuff": 255})
    settings = load_config("quickstart", {"stuff_area_limit": 256}).model.panoptic_settings
    assert (settings.panoptic_score_threshold, settings.panoptic_overlap_threshold) == (0.3, 0.5)
    assert settings.stuff_area_limit == 256
    criterion = build_criterion(load_config("quickstart").model, semantic_weight=2.0)
    assert criterion.semantic_weight == 2.0 and build_criterion(load_config("quickstart").model).semantic_weight == 0.5
    with pytest.raises(InputError, match="2 stuff names for 3"):
        construct(tiny_config("model.num_stuff=3", "model.semantic_channels=32").model, list("abcd"), STUFF[:2])


# ---- prediction


@pytest.fixture(scope="module")
def lively_model() -> SOLOv2:
    """Finds things and stuff in every picture."""
    model = panoptic_model("nothing frozen, batch norm", input_scale=(96, 64), max_instances=20, stuff_area_limit=30)
    nn.init.zeros_(model.head.category_predictor.bias)
    for predictor in (model.head.category_predictor, model.head.kernel_predictor, model.semantic_head.predictor):
        nn.init.normal_(predictor.weight, std=3)
    return model


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in ((64, 96), (90, 70))]


def same_segments(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return torch.equal(one["panoptic_map"], other["panoptic_map"]) and one["segments"] == other["segments"]


def test_predict_panoptic(lively_model: SOLOv2, pictures: list[np.ndarray]) -> None:
    """The instances of `predict`, and segments by the model's settings or those of the call."""
    assert lively_model.panoptic_settings.stuff_area_limit == 30
    found, plain = lively_model.predict_panoptic(pictures), lively_model.predict(pictures)
    for image, result, instances in zip(pictures, found, plain, strict=True):
        assert [*result] == [*instances, "panoptic_map", "segments"] and result["masks"].dtype == torch.bool
        assert all(torch.equal(result[name], value) for name, value in instances.items())
        assert result["panoptic_map"].dtype == torch.int32 and result["panoptic_map"].shape == image.shape[:2]
        images, sizes, original_sizes = lively_model.preprocess(image)
        with torch.no_grad():
            raw = lively_model(images)
        assert same_segments(lively_model.postprocess_panoptic(raw, sizes, original_sizes)[0], result)
        assert {segment["is_thing"] for segment in result["segments"]} == {True, False}
        for change, left in (
            ({"panoptic_score_threshold": 1.0}, {False}),
            ({"stuff_area_limit": 10**6}, {True}),
            ({"score_threshold": 1.0, "stuff_area_limit": 10**6}, set()),
        ):
            (changed,) = lively_model.predict_panoptic(image, mask_format="rle", **change)
            assert {segment["is_thing"] for segment in changed["segments"]} == left
            assert same_segments(lively_model.postprocess_panoptic(raw, sizes, original_sizes, **change)[0], changed)
            assert (len(changed["scores"]) == 0) == ("score_threshold" in change)
    kept = lively_model.predict_panoptic(pictures[0], panoptic_overlap_threshold=1.0, max_instances=5)[0]
    assert 2 < sum(segment["is_thing"] for segment in kept["segments"]) <= 5 == len(kept["scores"])


def test_panoptic_predictor_and_optimized_copies(lively_model: SOLOv2, pictures: list[np.ndarray]) -> None:
    (wanted,) = lively_model.predict_panoptic(pictures[1], mask_format="rle", precision="float32")
    for model in (lively_model, lively_model.optimize()):
        predictor = Predictor(model, Compute(CPU), panoptic=True)
        predictor.launch(model.load_batch(pictures[1]))
        (result,) = predictor.collect()
        assert (result["panoptic_map"] == wanted["panoptic_map"]).float().mean() > 0.98
        assert model.panoptic_settings == lively_model.panoptic_settings


def test_instance_models_have_no_segments() -> None:
    model = tiny_model()
    for call in (lambda: model.predict_panoptic("gone.jpg"), lambda: model.postprocess_panoptic({}, [], [])):
        with pytest.raises(InputError, match=r"no semantic head.*solov2_panoptic_r50_fpn_3x"):
            call()
    code = "import sys, solov2.build, solov2.predict; print('solov2.models.panoptic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.strip() == b"False"


# ---- training


@pytest.mark.parametrize("void", [False, True])
def test_every_parameter_of_the_head_gets_a_gradient(void: bool) -> None:
    model = panoptic_model().train()
    targets = tiny_targets(model, [2, 0], (64, 96))
    targets["semantic"] = torch.full((2, 16, 24), 255 if void else 1, dtype=torch.uint8)
    losses = SOLOv2Criterion(num_classes=3)(model(torch.randn(2, 3, 64, 96)), targets)
    sum(losses.values()).backward()
    assert [*losses] == ["loss_category", "loss_mask", "loss_semantic"] and (losses["loss_semantic"] == 0) == void
    for name, parameter in model.semantic_head.named_parameters():
        assert parameter.grad is not None and parameter.grad.any() != void, name


def semantic_batches() -> list[dict[str, Any]]:
    """Two images of four classes, of which the first is mostly void, each as a batch."""
    config, batches = tiny_config(), []
    for seed in (1, 2):
        batch = random_batch(config, seed=seed, images=1)
        labels = torch.randint(0, 4, (1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        labels[:, : 12 if seed == 1 else 1] = 255
        batch["targets"]["semantic"] = labels
        batches.append(batch)
    return batches


def test_accumulated_batches_count_their_labeled_pixels_together() -> None:
    config = tiny_config("model.num_stuff=3", "model.semantic_channels=32")
    torch.manual_seed(0)
    model, compute, batches = construct(config.model, list("abcd")).eval(), Compute(CPU), semantic_batches()
    criterion = build_criterion(config.model)
    positives, labeled = count_targets(batches, 4)
    assert labeled == 4 * 16 + 15 * 16 and positives > 0 and count_targets(batches[:1], 4) == (None, None)
    losses = backward(model, criterion, batches, compute.scaler(), compute)
    apart = repeat_forward(model, criterion, batches, compute)
    assert sum(apart[f"loss_semantic of batch {j}"] for j in (1, 2)).item() == pytest.approx(
        losses["loss_semantic"].item()
    )
    with torch.no_grad():
        logits = torch.cat([model(model.normalize(b["pixels"], b["sizes"]))["semantic_logits"] for b in batches])
    labels = torch.cat([batch["targets"]["semantic"] for batch in batches]).long()
    wanted = 0.5 * nn.functional.cross_entropy(logits, labels, ignore_index=255)
    assert losses["loss_semantic"].item() == pytest.approx(wanted.item(), rel=1e-5)
    void = [{"targets": {**b["targets"], "semantic": torch.full((1, 16, 16), 255)}} for b in batches]
    assert count_targets(void, 4)[1] == 1


def test_file_and_model_are_of_one_kind(tmp_path: Path) -> None:
    """Class counts come from the file; an instances file and a panoptic model do not fit, and the other way round."""
    (tmp_path / "panoptic").mkdir()
    panoptic, instances = PanopticTree(tmp_path / "panoptic"), CocoTree(tmp_path)
    instances.file.write_text(json.dumps(instances.content))

    def train_on(file: Path, stuff: int) -> Config:
        paths = {"train_annotations": str(file), "train_images": str(tmp_path)}
        config = load_config("quickstart", {**paths, "num_stuff": stuff})
        return with_classes(config, training_dataset(config))

    assert [train_on(panoptic.file, 7).model.num_classes, train_on(panoptic.file, 7).model.num_stuff] == [2, 3]
    assert train_on(instances.file, 0).model.num_stuff == 0
    with pytest.raises(InputError, match="instances file"):
        train_on(instances.file, 7)
    with pytest.raises(InputError, match="is a panoptic annotation file.*num_stuff > 0"):
        train_on(panoptic.file, 0)


def test_the_estimated_memory_includes_the_semantic_head() -> None:
    sizes = [
        saved_activation_bytes(tiny_config(*changes), (64, 64), CPU)
        for changes in ((), ("model.num_stuff=3", "model.semantic_channels=32"))
    ]
    recomputed = ("model.num_stuff=3", "model.head_norm=group", "model.semantic_channels=32")
    frozen = ("model.frozen_batch_norm=true", "train.recompute_activations=true")
    assert sizes[1] > 1.05 * sizes[0]
    targets = synthetic_targets(tiny_config("model.num_stuff=3").model, 2, (64, 96))
    assert targets["semantic"].shape == (2, 16, 24) and "semantic" not in synthetic_targets(
        tiny_config().model, 2, (64, 96)
    )
    model = panoptic_model()
    model.recompute_activations(True)
    assert model.semantic_head.recompute and model.mask_feature_head.recompute and model.backbone.recompute
    assert saved_activation_bytes(tiny_config(*recomputed, *frozen), (64, 64), CPU) < sizes[1]


# ---- weights


def test_checkpoint_of_a_panoptic_model(tmp_path: Path) -> None:
    model = panoptic_model(stuff_names=STUFF)
    model.stuff_category_ids = [20, 30, 40]
    read = build_model(weights=saved(model, tmp_path / "a.pth"))
    assert_same(model.state_dict(), read.state_dict())
    assert (read.stuff_names, read.stuff_category_ids, read.category_ids) == (STUFF, [20, 30, 40], [7, 8, 9])
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    assert (checkpoint.stuff_names, checkpoint.stuff_category_ids) == (STUFF, [20, 30, 40])
    assert not {"stuff_names", "stuff_category_ids"} & Checkpoint("x", {}, class_names=["a"]).content().keys()


def test_instance_weights_in_a_panoptic_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    instance = tiny_model()
    with caplog.at_level(logging.WARNING):
        model = build_model(weights=saved(instance, tmp_path / "a.pth"), **PANOPTIC)
    assert_same(instance.state_dict(), instance_weights(model))
    assert [r for r in caplog.messages if "no semantic head" in r and "re-initialized" in r] == caplog.messages
    assert len(caplog.messages) == 1 and model.semantic_head.predictor.bias.shape == (4,)


def test_panoptic_weights_in_an_instance_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    panoptic = panoptic_model()
    with caplog.at_level(logging.WARNING):
        model = build_model(weights=saved(panoptic, tmp_path / "a.pth"), num_stuff=0)
    assert_same(instance_weights(panoptic), model.state_dict())
    assert model.semantic_head is None and model.stuff_names == model.stuff_category_ids == []
    assert len(caplog.messages) == 1 and "semantic head" in caplog.text and "left out" in caplog.text


def test_stuff_layer_for_other_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of another number it is re-initialized; rows of known names, and that of the things, are kept."""
    panoptic = panoptic_model(stuff_names=STUFF)
    path, old = saved(panoptic, tmp_path / "a.pth"), panoptic.semantic_head.predictor
    with caplog.at_level(logging.WARNING):
        other = build_model(weights=path, num_stuff=5)
        assert len(caplog.messages) == 1 and "3 stuff classes and the model 5" in caplog.text
        matched = build_model(weights=path, stuff_names=["sky", "water", "road", "sand"])
    assert other.semantic_head.predictor.bias.shape == (6,) and other.stuff_names[0] == "stuff 0"
    assert_same(instance_weights(other), instance_weights(panoptic))
    new = matched.semantic_head.predictor.weight
    assert torch.equal(new[[0, 2, 4]], old.weight[[2, 0, 3]]) and not (new[1] == old.weight).all((1, 2, 3)).any()
    assert "stuff layer" in caplog.messages[-1] and "water" in caplog.messages[-1] and matched.stuff_names[0] == "sky"


def test_damaged_stuff_layer(tmp_path: Path) -> None:
    model = panoptic_model()
    path = saved(model, tmp_path / "a.pth")
    content = read_checkpoint(path)
    content.weights["semantic_head.predictor.bias"] = torch.zeros(2, 2)
    content.save(path)
    with pytest.raises(InputError, match="stuff layer has shape"):
        read_checkpoint(path)
    content.weights["semantic_head.predictor.bias"] = torch.zeros(4)
    content.weights["semantic_head.levels.0.0.norm.bias"] = torch.zeros(5)
    content.save(path)
    with pytest.raises(InputError, match=r"semantic_head.levels.0.0.norm.bias is \[5\]"):
        build_model(weights=path)


def test_names_of_mmdetection() -> None:
    """Those of its Panoptic FPN, there and back."""
    state = panoptic_model().state_dict()
    theirs = to_mmdet(state)
    assert {n for n in theirs if n.startswith("semantic_head.")} == {
        *(
            f"semantic_head.conv_upsample_layers.{i}.conv.{j}.{part}"
            for i, j in [(0, 0), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
            for part in ("conv.weight", "gn.weight", "gn.bias")
        ),
        *(f"semantic_head.conv_logits.{part}" for part in ("weight", "bias")),
    }
    assert_same(convert_state_dict(theirs)[0], state)
