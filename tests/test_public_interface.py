"""The public names: they exist, with the documented arguments, defaults and kinds.

Callers keep working when an argument is added, keyword-only and with a default, or when a required one gets a default;
nothing may be renamed, moved or reordered.
"""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import solov2

# (module, name) -> the documented signature, as Python. Methods are listed without `self`.
SIGNATURES = {
    ("solov2", "build_model"): "(name_or_config, *, weights=None, num_classes=None, device=None, **overrides)",
    ("solov2", "list_models"): "()",
    ("solov2", "load"): "(path, device=None)",
    ("solov2", "SOLOv2.save"): "(path)",
    ("solov2", "find_images"): "(folder)",
    ("solov2", "draw_instances"): "(image, result, class_names)",
    ("solov2", "draw_panoptic"): "(image, result, model)",
    ("solov2", "to_supervision"): "(result, class_names=None)",
    ("solov2", "train"): (
        "(name_or_config, *, data=None, weights=None, output=None, resume=False, device=None, **overrides)"
    ),
    ("solov2", "SOLOv2.forward"): "(images)",
    ("solov2", "SOLOv2.normalize"): "(pixels, sizes)",
    ("solov2", "SOLOv2.preprocess"): "(images)",
    ("solov2", "SOLOv2.postprocess"): "(raw, sizes, original_sizes, *, mask_format='bool', **settings)",
    ("solov2", "SOLOv2.predict"): (
        "(images, *, score_threshold=None, max_instances=None, batch_size=1, mask_format='bool')"
    ),
    ("solov2", "SOLOv2.predict_iter"): (
        "(images, *, score_threshold=None, max_instances=None, batch_size=1, mask_format='bool')"
    ),
    ("solov2", "SOLOv2.predict_panoptic"): (
        "(images, *, score_threshold=None, max_instances=None, panoptic_score_threshold=None, "
        "panoptic_overlap_threshold=None, stuff_area_limit=None, batch_size=1, mask_format='bool')"
    ),
    ("solov2", "SOLOv2.postprocess_panoptic"): "(raw, sizes, original_sizes, *, mask_format='bool', **settings)",
    ("solov2.targets", "TargetAssigner"): "(grid_sizes, scale_ranges, *, num_classes, center_sigma=0.2)",
    ("solov2.targets", "TargetAssigner.__call__"): "(instances, padded_size)",
    ("solov2.losses", "SOLOv2Criterion"): (
        "(*, num_classes, mask_weight=3.0, focal_gamma=2.0, focal_alpha=0.25, semantic_weight=0.5)"
    ),
    ("solov2.losses", "SOLOv2Criterion.forward"): "(raw, targets, num_positives=None, num_labeled=None)",
    ("solov2.ops.matrix_nms", "matrix_nms"): "(masks, labels, scores, *, kernel='gaussian', sigma=2.0)",
    ("solov2.hub", "push_to_hub"): "(model, repo, *, license=None, figures=None, private=None, token=None)",
    ("solov2.hub", "from_pretrained"): "(repo, *, revision=None, token=None, device=None)",
    ("solov2.convert", "convert_state_dict"): "(state_dict)",
    ("solov2.commands.predict", "main"): "(argv=None)",
    ("solov2.commands.train", "main"): "(argv=None)",
    ("solov2.commands.evaluate", "main"): "(argv=None)",
    ("solov2.commands.benchmark", "main"): "(argv=None)",
}


def documented(text: str) -> inspect.Signature:
    """The signature written in `text`."""
    namespace: dict[str, Any] = {}
    exec(f"def f{text}: ...", namespace)
    return inspect.signature(namespace["f"])


def find(module: str, name: str) -> Callable:
    found = importlib.import_module(module)
    for step in name.split("."):
        found = getattr(found, step)
    return found


def same_parameters(actual: inspect.Signature, wanted: inspect.Signature) -> bool:
    """Whether every call allowed by `wanted` means the same for `actual`; `self` and annotations are ignored."""
    parameters = [item for item in actual.parameters.values() if item.name != "self"]
    added = [
        item
        for item in parameters
        if item.name not in wanted.parameters and item.kind is item.KEYWORD_ONLY and item.default is not item.empty
    ]
    kept, promised = [item for item in parameters if item not in added], list(wanted.parameters.values())
    return [(item.name, item.kind) for item in kept] == [(item.name, item.kind) for item in promised] and all(
        item.default is item.empty or own.default == item.default for own, item in zip(kept, promised, strict=True)
    )


@pytest.mark.parametrize(("module", "name"), SIGNATURES)
def test_signature(module: str, name: str) -> None:
    actual, wanted = inspect.signature(find(module, name)), documented(SIGNATURES[module, name])
    assert same_parameters(actual, wanted), f"{module}.{name}{actual} is documented as {wanted}"


def test_the_comparison_sees_differences() -> None:
    wanted = documented("(a, *, b=1)")
    for other in ("(self, a, *, b=1, c=2)", "(a=None, *, b=1)"):
        assert same_parameters(documented(other), wanted), other
    for other in ("(a, b=1)", "(a, *, b=2)", "(a, *, b)", "(a, *, b=1, c)", "(x, *, b=1)", "(a, c=0, *, b=1)", "(a)"):
        assert not same_parameters(documented(other), wanted), other


def test_public_names_are_exported() -> None:
    names = [
        *("SOLOv2", "TrainResult", "build_model", "draw_instances", "draw_panoptic", "find_images", "list_models"),
        *("load", "to_supervision", "train"),
    ]
    modules = ["convert", "data", "evaluation", "hub", "losses", "models", "ops", "targets"]
    assert solov2.__all__ == names
    assert dir(solov2) == sorted([*names, *modules, "__version__"])
    for name in dir(solov2):
        assert getattr(solov2, name) is not None
    assert solov2.targets.TargetAssigner and solov2.losses.SOLOv2Criterion and solov2.ops.matrix_nms.matrix_nms
    with pytest.raises(AttributeError, match="no_such_name"):
        solov2.no_such_name  # noqa: B018


@pytest.mark.parametrize("name", ["ops.matrix_nms.matrix_nms", "models.solov2.SOLOv2", "evaluation.coco.CocoEvaluator"])
def test_submodules_are_available_without_another_import(name: str) -> None:
    subprocess.run([sys.executable, "-c", f"import solov2; solov2.{name}"], check=True, timeout=100)


def test_model_names() -> None:
    assert set(solov2.list_models()) == {
        "quickstart",
        "solov2_r50_fpn_1x",
        "solov2_r50_fpn_3x",
        "solov2_r101_fpn_3x",
        "solov2_r101_dcn_fpn_3x",
        "solov2_x101_dcn_fpn_3x",
        "solov2_light_r18_fpn_3x",
        "solov2_light_r34_fpn_3x",
        "solov2_light_r50_fpn_3x",
        "solov2_light_r50_dcn_fpn_3x",
        "solov2_panoptic_r50_fpn_1x",
        "solov2_panoptic_r50_fpn_3x",
        "solov2_panoptic_r101_fpn_3x",
        "solov2_r50_fpn_3x_plus",
        "solov2_light_r50_fpn_3x_plus",
        "quickstart_panoptic",
    }


def test_attributes_of_a_built_model() -> None:
    model = solov2.build_model("quickstart")
    assert not model.training
    assert all(isinstance(name, str) for name in model.class_names) and len(model.class_names) == model.num_classes == 4
    assert model.device == torch.device("cpu")
