"""Building models from names, loading weights into them, and the errors for those that do not fit."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from helpers.tiny_models import save_content
from helpers.tiny_runs import tiny_config

from solov2.build import build_compute, build_model, construct, prepare_for_training
from solov2.checkpoint import load_file
from solov2.data.categories import COCO_CLASSES, default_class_names
from solov2.errors import InputError
from solov2.models.layers import synchronize_batch_norms

FROZEN = ("backbone.bn1", "backbone.layer1.", "backbone.layer2.")


@pytest.fixture
def saved(tmp_path):
    """(file of a tiny model, the model)."""
    torch.manual_seed(0)
    config = tiny_config()
    model = construct(config.model, ["a", "b", "c", "d"])
    save_content(
        tmp_path / "tiny.pth",
        {"model": model.state_dict(), "config": config.to_dict(), "class_names": model.class_names},
    )
    return tmp_path / "tiny.pth", model


def test_own_checkpoint_carries_its_configuration(saved):
    path, model = saved
    loaded = build_model(weights=path, score_threshold=0.25)
    assert loaded.class_names == ["a", "b", "c", "d"] and loaded.settings.score_threshold == 0.25
    assert loaded.grid_sizes == model.grid_sizes and not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_settings_that_differ_from_the_checkpoint_are_warned_about(saved, caplog):
    """No tensor shape depends on grids, sizes and thresholds, so loading cannot notice."""
    path, model = saved
    loaded = build_model(tiny_config("model.grid_sizes=[24,16,12,8,6]"), weights=path, score_threshold=0.5)
    assert loaded.grid_sizes == (24, 16, 12, 8, 6)
    [warning] = caplog.messages
    assert re.search(r"grid_sizes \[8.*\] -> \[24", warning) and "score_threshold" not in warning
    build_model(tiny_config(), weights=path)
    assert len(caplog.messages) == 1


def test_category_ids_come_from_the_file_or_are_cocos(saved, tmp_path):
    path, model = saved
    assert build_model(weights=path).category_ids == [1, 2, 3, 4]
    content = load_file(path)
    save_content(tmp_path / "gaps.pth", {**content, "category_ids": [1, 3, 4, 7]})
    assert build_model(weights=tmp_path / "gaps.pth").optimize().category_ids == [1, 3, 4, 7]
    coco = build_model("solov2_light_r18_fpn_3x")
    pairs = dict(zip(coco.class_names, coco.category_ids, strict=True))
    assert (pairs["person"], pairs["stop sign"], pairs["toothbrush"]) == (1, 13, 90)


def test_other_class_count_keeps_everything_else(saved, caplog):
    path, model = saved
    loaded = build_model(weights=path, num_classes=7)
    assert re.search("4 classes and the model 7.*re-initialized", caplog.text)
    assert loaded.class_names == [f"class {i}" for i in range(7)]
    for name, value in loaded.state_dict().items():
        if not name.startswith("head.category_predictor"):
            assert torch.equal(value, model.state_dict()[name]), name


def test_errors_list_the_tensors_that_do_not_fit(saved, tmp_path):
    path, model = saved
    state = model.state_dict()
    odd = {**state, "extra.weight": torch.zeros(1), "fpn.lateral.0.bias": torch.zeros(3)}
    del odd["fpn.lateral.1.bias"]
    save_content(tmp_path / "odd.pth", {"model": odd, "config": tiny_config().to_dict(), "class_names": list("abcd")})
    with pytest.raises(InputError) as error:
        build_model(weights=tmp_path / "odd.pth")
    message = str(error.value)
    for part in (
        "1 missing (fpn.lateral.1.bias)",
        "1 unexpected (extra.weight)",
        "fpn.lateral.0.bias is [3] and should be [32]",
    ):
        assert part in message
    with pytest.raises(InputError, match="does not fit"):
        build_model("solov2_light_r18_fpn_3x", weights=path)


def test_names_and_overrides():
    with pytest.raises(InputError, match="did you mean .*solov2_r50_fpn_1x"):
        build_model("solov2_r50")
    with pytest.raises(InputError, match="did you mean max_instances"):
        build_model("quickstart", max_instance=3)
    with pytest.raises(InputError, match="name a model"):
        build_model()
    model = build_model("quickstart", num_classes=80, device="cpu")
    assert model.class_names == list(COCO_CLASSES) and len(COCO_CLASSES) == 80


def test_batch_norm_is_not_trained_on_a_single_value():
    small = ("data.train_scales=[32,64]", "model.frozen_batch_norm=false")
    cpu = torch.device("cpu")
    for settings, fits in (
        ((*small, "train.batch_size=1"), False),
        (("data.train_scales=[32]", "model.frozen_batch_norm=true", "train.batch_size=1"), False),  # of the mask branch
        ((*small, "train.batch_size=2"), True),
        (("data.train_scales=[33]", "model.frozen_batch_norm=false", "train.batch_size=1"), True),
    ):
        config = tiny_config(*settings)
        model = construct(config.model, ["a"] * config.model.num_classes)
        if fits:
            prepare_for_training(model, config, build_compute(config, cpu))
        else:
            with pytest.raises(InputError, match=r"data.train_scales \(32\)"):
                prepare_for_training(model, config, build_compute(config, cpu))


def test_only_trained_batch_norms_are_synchronized() -> None:
    config = tiny_config("model.frozen_stages=2")
    torch.manual_seed(0)
    model = construct(config.model, default_class_names(4)).train()
    plain, x = copy.deepcopy(model), torch.rand(2, 3, 64, 64)
    count = synchronize_batch_norms(model)
    kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    synced = {name for name, kind in kinds.items() if issubclass(kind, torch.nn.SyncBatchNorm)}
    assert len(synced) == count and synced | {n for n in kinds if n.startswith(FROZEN)} == set(kinds)
    assert not any(name.startswith(FROZEN) for name in synced) and any(name.startswith("head.") for name in synced)
    assert model.state_dict().keys() == plain.state_dict().keys()
    one, two = model(x), plain(x)  # one process: the same function
    assert all(torch.equal(first, second) for first, second in zip(one["kernels"], two["kernels"], strict=True))
    model.train()  # frozen norms stay so, synchronized ones train
    assert not model.backbone.bn1.training and model.backbone.layer3[0].bn1.training
    assert copy.deepcopy(model).eval()(x)["mask_features"].isfinite().all()


def test_batch_norms_are_not_synchronized_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    config, cpu = tiny_config("train.sync_batch_norm=true"), torch.device("cpu")
    model = construct(config.model, default_class_names(4))
    prepare_for_training(model, config, build_compute(config, cpu))  # alone, there is nothing to synchronize
    monkeypatch.setattr("solov2.distributed.world_size", lambda: 2)
    with pytest.raises(InputError, match=r"train\.sync_batch_norm"):
        prepare_for_training(model, config, build_compute(config, cpu))
