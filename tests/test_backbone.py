"""The weights that a backbone starts from; none of them is silently random."""

from __future__ import annotations

import sys
import urllib.error
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from helpers.tiny_runs import SETTINGS
from torch import nn

import solov2
from solov2.config import load_config
from solov2.errors import InputError
from solov2.models.resnet import ResNet
from solov2.training.backbone import IMAGENET_WEIGHTS, load_pretrained_backbone


def test_pretrained_backbone_from_a_torchvision_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = torchvision.models.resnet18()
    torch.save(reference.state_dict(), tmp_path / "resnet18.pth")
    backbone = ResNet("resnet18")
    load_pretrained_backbone(backbone, "resnet18", str(tmp_path / "resnet18.pth"))
    x = torch.rand(1, 3, 64, 64)
    reference.eval()
    with torch.no_grad():
        expected = reference.layer2(
            reference.layer1(reference.maxpool(reference.relu(reference.bn1(reference.conv1(x)))))
        )
        torch.testing.assert_close(backbone.eval()(x)[1], expected)
    with pytest.raises(InputError, match="does not fit"):
        load_pretrained_backbone(ResNet("resnet34"), "resnet34", str(tmp_path / "resnet18.pth"))


def test_offline_error_of_the_pretrained_backbone_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(InputError) as error:
        load_pretrained_backbone(ResNet("resnet18"), "resnet18", "imagenet")
    for part in (IMAGENET_WEIGHTS["imagenet"]["resnet18"].url, str(tmp_path), "no network", "none"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_the_second_weights_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each setting takes its own file; the state of a stand-in arrives in the backbone."""
    reference = torchvision.models.resnet50()
    asked: list[str] = []

    def download(url: str, **options: Any) -> dict[str, torch.Tensor]:
        assert options["weights_only"] and options["check_hash"]
        asked.append(url.rpartition("/")[2])
        return reference.state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    for source in ("imagenet", "imagenet_v2"):
        backbone = ResNet("resnet50")
        load_pretrained_backbone(backbone, "resnet50", source)
        assert torch.equal(backbone.layer4[2].conv3.weight, reference.layer4[2].conv3.weight)
    assert asked == ["resnet50-0676ba61.pth", "resnet50-11ad3fa6.pth"]


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [("resnet18", "imagenet_v2", "to imagenet, none"), ("resnet10", "imagenet", "to none")],
)
def test_weights_that_do_not_exist(name: str, source: str, words: str) -> None:
    with pytest.raises(InputError, match=f"no {source} weights exist for {name}; .*{words} or a file"):
        load_pretrained_backbone(ResNet(name), name, source)


def stand_in(monkeypatch: pytest.MonkeyPatch, model: nn.Module | Exception) -> list[tuple[str, bool]]:
    """A package `timm` with one pretrained model, "known"; returns the list of its calls."""
    calls: list[tuple[str, bool]] = []

    def create_model(name: str, *, pretrained: bool) -> nn.Module:
        calls.append((name, pretrained))
        if isinstance(model, Exception):
            raise model
        return model

    timm = SimpleNamespace(create_model=create_model, is_model_pretrained=lambda name: name == "known")
    monkeypatch.setitem(sys.modules, "timm", timm)  # type: ignore[arg-type]
    return calls


def test_weights_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = torchvision.models.resnet18()
    calls, backbone = stand_in(monkeypatch, reference), ResNet("resnet18")
    load_pretrained_backbone(backbone, "resnet18", "timm:known")
    assert calls == [("known", True)]
    assert torch.equal(backbone.layer4[1].bn2.weight, reference.layer4[1].bn2.weight)
    assert torch.equal(backbone.conv1.weight, reference.conv1.weight)
    with pytest.raises(InputError, match="timm has no pretrained weights 'other'.*list_pretrained"):
        load_pretrained_backbone(backbone, "resnet18", "timm:other")
    reference.conv1 = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 64, 3))  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"timm:known does not fit this model: 1 missing \(conv1\.weight\)"):
        load_pretrained_backbone(backbone, "resnet18", "timm:known")


def test_errors_of_timm_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, ConnectionError("no\nnetwork"))
    with pytest.raises(InputError, match=r"'known' of timm .*\(no network\)") as error:
        load_pretrained_backbone(ResNet("resnet18"), "resnet18", "timm:known")
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"solov2\[timm\]"):
        load_pretrained_backbone(ResNet("resnet18"), "resnet18", "timm:known")


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnext101_64x4d"])
def test_real_models_of_timm_have_our_names(name: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs, ours = timm.create_model(name).state_dict(), ResNet(name).state_dict()
        deep = timm.create_model("resnet50d").state_dict()
    shapes = {key: value.shape for key, value in theirs.items() if not key.startswith("fc.")}
    assert shapes == {key: value.shape for key, value in ours.items()}
    assert not deep.keys() >= ours.keys()


def test_a_run_never_starts_from_random_weights_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    config = load_config("quickstart", SETTINGS)
    for source, words in (("timm:resnet10t", "timm"), ("imagenet_v2", "resnet10"), ("imagenet_v3", "imagenet_v3")):
        with pytest.raises(InputError, match=words):
            solov2.train(config, data=tmp_path / "data", output=tmp_path / "run", device="cpu", workers=0,
                         pretrained_backbone=source)  # fmt: skip
    assert not (tmp_path / "run").exists()
