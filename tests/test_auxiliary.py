"""The auxiliary semantic loss of instance models: its targets, its head in training only, and runs with and without."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.coco_files import CocoTree, rectangle
from helpers.tiny_runs import arguments, random_batch, tiny_config
from torch import Tensor

from solov2.build import add_auxiliary_head, build_assigner, build_criterion, build_model, construct
from solov2.checkpoint import load_file
from solov2.commands.convert import main as convert_main
from solov2.commands.train import main as train_main
from solov2.compute import Compute
from solov2.config import Config, load_config
from solov2.data.build import oracle_dataset, training_dataset, with_classes
from solov2.data.coco import CocoInstances
from solov2.data.loader import Collate
from solov2.data.transforms import TrainTransform, seeded_generator
from solov2.errors import InputError
from solov2.export.graph import ExportedSOLOv2
from solov2.models.optimize import inference_copy
from solov2.models.solov2 import SOLOv2
from solov2.ops.encoded_masks import EncodedMasks
from solov2.targets import TargetAssigner
from solov2.training.dry_run import empty_model, estimate_activation_bytes
from solov2.training.optim import WeightAverage
from solov2.training.step import backward, count_targets

CPU = torch.device("cpu")
ON = ("train.semantic_auxiliary=0.5", "model.semantic_channels=32")
RAW = ["category_logits", "kernels", "mask_features"]
VOID, BACKGROUND = 255, 4


def trained_model(*changes: str) -> SOLOv2:
    """The tiny model as training starts with it, always of the same random weights."""
    config = tiny_config(*changes)
    torch.manual_seed(0)
    return add_auxiliary_head(construct(config.model, list("abcd")), config)


def auxiliary_batch(seed: int = 1) -> dict[str, Any]:
    """Two images with labels of all classes, in a map whose left third is ignored."""
    batch = random_batch(tiny_config(), seed=seed)
    labels = torch.randint(0, 5, (2, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    labels[:, :, :5] = VOID
    batch["targets"]["semantic"] = labels
    return batch


# ---- targets


def box_mask(height: int, width: int, rows: slice, columns: slice) -> Tensor:
    mask = torch.zeros(height, width, dtype=torch.uint8)
    mask[rows, columns] = 1
    return mask


def test_the_target_is_the_union_of_the_masks() -> None:
    """20 x 28 pixels, padded to 32 x 32: 5 x 7 blocks, of which the pixels (4 i + 2, 4 j + 2) count."""
    size = (20, 28)
    masks = [
        box_mask(*size, slice(0, 12), slice(0, 14)),  # ends before the pixel 14, the center of block 3
        box_mask(*size, slice(7, 20), slice(10, 15)),  # class 2, from block row 2; block column 2 overlaps the first
        box_mask(*size, slice(0, 2), slice(20, 28)),  # covers no center
    ]
    crowd = box_mask(*size, slice(14, 20), slice(12, 28))
    truth = {
        "boxes": torch.tensor([[0, 0, 14, 12], [10, 7, 15, 20], [20, 0, 28, 2]], dtype=torch.float32),
        "labels": torch.tensor([1, 2, 3]),
        "masks": torch.stack(masks),
    }
    T, V = BACKGROUND, VOID
    wanted = [
        [1, 1, 1, T, T, T, T, V],
        [1, 1, 1, T, T, T, T, V],
        [1, 1, V, 2, T, T, T, V],
        [T, T, 2, V, V, V, V, V],
        [T, T, 2, V, V, V, V, V],
        *[[V] * 8] * 3,
    ]
    assign = build_assigner(tiny_config().model)
    found = assign([{**truth, "ignored": crowd[None]}, {**truth, "ignored": crowd[None][:0]}], (32, 32))
    assert found["semantic"].dtype == torch.uint8 and found["semantic"][0].tolist() == wanted
    assert found["semantic"][1, 3:5].tolist() == [[T, T, 2, 2, T, T, T, V]] * 2  # without the crowd
    plain = assign([truth, truth], (32, 32))
    assert plain.keys() == found.keys() - {"semantic"}
    assert all(torch.equal(plain[key], found[key]) for key in ("category", "positives", "masks"))


@pytest.mark.parametrize("count", [0, 1, 40])
def test_masks_drawn_in_parts_give_the_same_target(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As planes, and as segmentations that are drawn a few at a time; against a loop over pixels."""
    generator = torch.Generator().manual_seed(count)
    corners = torch.randint(0, 40, (count + 3, 2), generator=generator).tolist()
    segments = [rectangle(x, y, 9 + n % 4, 6 + n % 5) for n, (x, y) in enumerate(corners)]
    encoded, ignored = (EncodedMasks.from_segmentations(part, (46, 50)) for part in (segments[3:], segments[:3]))
    planes, crowds = (torch.cat([chunk for chunk, _ in masks.chunks()]) for masks in (encoded, ignored))
    labels = torch.randint(0, 254, (count,), generator=generator)
    boxes = torch.tensor([[x, y, x + 9, y + 6] for x, y in corners[3:]], dtype=torch.float32).reshape(-1, 4)
    wanted = torch.full((16, 16), VOID, dtype=torch.uint8)
    for i in range(11):
        for j in range(12):
            here = planes[:, 4 * i + 2, 4 * j + 2].nonzero().flatten().tolist()
            alone = labels[here[0]] if here else 254
            wanted[i, j] = VOID if len(here) > 1 or crowds[:, 4 * i + 2, 4 * j + 2].any() else alone
    assign = TargetAssigner([8], [(1, 64)], num_classes=254)
    monkeypatch.setattr(EncodedMasks.chunks, "__defaults__", (3 * 46 * 50,))
    for masks, regions in ((planes, crowds), (planes.bool(), crowds), (encoded, ignored)):
        truth = {"boxes": boxes, "labels": labels, "masks": masks, "ignored": regions}
        assert torch.equal(assign([truth], (64, 64))["semantic"][0], wanted)


def test_ignored_regions_are_transformed_like_masks() -> None:
    segments = [rectangle(3, 5, 20, 11), rectangle(30, 2, 7, 33)]
    masks = EncodedMasks.from_segmentations(segments, (40, 60))
    planes = torch.cat([chunk for chunk, _ in masks.chunks()])
    boxes = torch.tensor([[3, 5, 23, 16], [30, 2, 37, 35]], dtype=torch.float32)
    sample = {"image": torch.zeros(3, 40, 60, dtype=torch.uint8), "boxes": boxes, "labels": torch.tensor([0, 1])}
    sample |= {"masks": masks, "ignored": masks, "original_size": (40, 60), "image_id": 1}
    transform, shapes = TrainTransform(scales=(24, 32), max_size=64, dihedral=True), set()
    for seed in range(12):
        moved = transform(sample, seeded_generator(seed))
        first, second = (torch.cat([chunk for chunk, _ in moved[key].chunks()]) for key in ("masks", "ignored"))
        assert torch.equal(first, second) and first.any()
        drawn = transform({**sample, "masks": planes, "ignored": planes}, seeded_generator(seed))
        assert torch.equal(drawn["ignored"], second)
        shapes.add(tuple(second.shape))
    assert len(shapes) == 4


def test_crowds_travel_only_for_the_loss(tmp_path: Path) -> None:
    tree = CocoTree(tmp_path)
    tree.content["annotations"][1]["iscrowd"] = 1
    tree.file.write_text(json.dumps(tree.content))
    paths = [f"data.{split}_{kind}={path}" for split in ("train", "val")
             for kind, path in (("annotations", tree.file), ("images", tree.images))]  # fmt: skip
    plain, on = (training_dataset(tiny_config(*paths, *changes)) for changes in ((), ON))
    assert "ignored" not in plain[0] and "ignored" not in oracle_dataset(tiny_config(*paths, *ON), "val")[0]
    assert [len(on[i]["ignored"]) for i in range(3)] == [1, 0, 0] and on[0].keys() - plain[0].keys() == {"ignored"}
    assert [len(on[i]["masks"]) for i in range(3)] == [len(plain[i]["masks"]) for i in range(3)] == [1, 2, 2]
    [(region, _)] = on[0]["ignored"].chunks()
    assert region.nonzero().amin(0).tolist() == [0, 20, 40] and region.sum() == 12 * 14
    as_instances = training_dataset(tiny_config(*paths, *ON, "data.crowd=instance"))
    assert (len(as_instances[0]["masks"]), len(as_instances[0]["ignored"])) == (2, 0)
    assign = build_assigner(tiny_config("model.num_classes=2").model)
    batches = [Collate(assign)([dataset[i] for i in range(3)]) for dataset in (plain, on)]
    assert [sorted(batch["targets"].keys() - {"category"}) for batch in batches][0] == [
        "instances_per_image", "masks", "positives", "positives_per_image",
    ]  # fmt: skip
    semantic = batches[1]["targets"]["semantic"]
    assert semantic.shape == (3, 16, 16) and semantic.unique().tolist() == [0, 1, 2, VOID]
    assert (semantic[0, 5:8, 10:12] == VOID).all() and semantic[0, 2:6, 2:7].unique().tolist() == [0]
    tree.content["annotations"][1]["segmentation"] = {"size": [3, 3], "counts": [9]}
    tree.file.write_text(json.dumps(tree.content))
    CocoInstances(tree.file, tree.images, training=True)
    with pytest.raises(InputError, match="annotation 12"):
        CocoInstances(tree.file, tree.images, training=True, ignored=True)


# ---- network and losses


def test_without_the_setting_nothing_is_added() -> None:
    """With it, the other outputs and losses of the first step keep their bits."""
    plain, on = trained_model(), trained_model(*ON)
    assert plain.auxiliary_head is None and not any("auxiliary" in name for name in plain.state_dict())
    batch = auxiliary_batch()
    images = plain.normalize(batch["pixels"], batch["sizes"])
    assert list(plain.train()(images)) == RAW and list(on.train()(images)) == [*RAW, "semantic_logits"]
    plain, on = trained_model(), trained_model(*ON)
    unlabeled = {**batch, "targets": {key: value for key, value in batch["targets"].items() if key != "semantic"}}
    criterion, compute = build_criterion(tiny_config().model, semantic_weight=0.5), Compute(CPU)
    alone = backward(plain.train(), criterion, [unlabeled], compute.scaler(), compute)
    losses = backward(on.train(), criterion, [batch], compute.scaler(), compute)
    assert alone.keys() == {"loss_category", "loss_mask"} and losses.keys() - alone.keys() == {"loss_semantic"}
    assert all(torch.equal(alone[name], losses[name]) for name in alone)
    assert losses["loss_semantic"].item() == pytest.approx(0.5 * torch.tensor(5.0).log().item(), rel=0.1)
    with torch.no_grad():
        first, second = (model.eval()(images) for model in (plain, on))
    assert list(first) == list(second) == RAW
    assert all(
        map(torch.equal, [*first["kernels"], first["mask_features"]], [*second["kernels"], second["mask_features"]])
    )


def test_the_loss_alone_trains_the_pyramid() -> None:
    model, batch = trained_model(*ON).train(), auxiliary_batch()
    criterion = build_criterion(tiny_config().model, semantic_weight=0.5)
    raw = model(model.normalize(batch["pixels"], batch["sizes"]))
    assert raw["semantic_logits"].shape == (2, 5, 16, 16)
    criterion(raw, batch["targets"])["loss_semantic"].backward()
    for part in (model.backbone.layer4, model.fpn.lateral, model.auxiliary_head):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters() if p.ndim > 1)
    assert model.head.category_predictor.weight.grad is None
    labeled = count_targets([auxiliary_batch(1), auxiliary_batch(2)], 4)[1]
    assert labeled == 2 * 2 * 16 * 11


def test_copies_for_inference_are_those_of_a_plain_model() -> None:
    plain, on = trained_model(), trained_model(*ON)
    images = torch.zeros(1, 3, 64, 64)
    for make in (SOLOv2.optimize, inference_copy, lambda model: WeightAverage(model, 0.9).module):
        first, second = make(plain), make(on)
        assert second.auxiliary_head is None and first.state_dict().keys() == second.state_dict().keys()
        assert list(second(images)) == RAW
    exported = ExportedSOLOv2(on)
    assert exported.state_dict().keys() == ExportedSOLOv2(plain).state_dict().keys()
    assert on.auxiliary_head is not None and on.training  # the copied model is left as it was
    on.recompute_activations(True)
    assert on.auxiliary_head.recompute


def test_averages_leave_the_head_out() -> None:
    model = trained_model(*ON)
    average = WeightAverage(model, 0.5)
    average.update(model)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
        model.backbone.bn1.running_mean.fill_(3)
    average.update(model)
    for name, value in average.module.named_parameters():
        torch.testing.assert_close(value, before[name] + 0.5)
    assert (average.module.backbone.bn1.running_mean == 1.5).all()


def test_dry_runs_count_the_head() -> None:
    config = tiny_config(*ON)
    model = add_auxiliary_head(empty_model(config.model), config)
    head = sum(p.numel() for p in model.auxiliary_head.parameters())
    assert head > 32 * 5 and {p.device.type for p in model.parameters()} == {"meta"}
    sizes = [estimate_activation_bytes(each, (64, 64), CPU) for each in (config, tiny_config())]
    assert sizes[0] > 1.05 * sizes[1]


# ---- settings


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="^quickstart: train.semantic_auxiliary must be 0 for panoptic models"):
        tiny_config(*ON, "model.num_stuff=3")
    with pytest.raises(InputError, match="train.semantic_auxiliary must be 0 for more than 254 classes.*255"):
        tiny_config(*ON, "model.num_classes=255")
    with pytest.raises(InputError, match="model.semantic_channels must be a multiple of 32"):
        load_config("solov2_r50_fpn_1x", ["train.semantic_auxiliary=1", "model.semantic_channels=40"])
    assert Config().train.semantic_auxiliary == 0 and tiny_config("model.num_classes=255", "model.num_stuff=3")
    dataset = type("Dataset", (), {"class_names": ["x"] * 255, "stuff_names": []})()
    with pytest.raises(InputError, match="254 classes"):
        with_classes(tiny_config(*ON), dataset)  # the annotations decide


# ---- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(dataset, finished run of two epochs)."""
    folder = tmp_path_factory.mktemp("auxiliary")
    assert train_main(command(folder / "data", folder / "run", *ON)) == 0
    return folder / "data", folder / "run"


def command(data: Path, output: Path, *changes: str, words: tuple[str, ...] = ()) -> list[str]:
    """A run of two epochs without validation, with a checkpoint of step 6, an average and accumulation."""
    settings = ("epochs=2", "evaluate_every=0", "checkpoint_steps=6", "keep_checkpoints=9", "ema_decay=0.5",
                "batch_size=2", "accumulate=2")  # fmt: skip
    changes = (*(f"train.{setting}" for setting in settings), "data.workers=0", *changes)
    return arguments(data, output, *(word for change in changes for word in ("--set", change)), *words)


def test_a_killed_run_ends_as_a_whole_one(run: tuple[Path, Path], tmp_path: Path) -> None:
    data, folder = run
    shutil.copy(folder / "step_00000006.pth", tmp_path / "cut.pth")
    words = ("--resume", str(tmp_path / "cut.pth"))
    assert train_main(command(data, tmp_path / "run", *ON, words=words)) == 0
    whole, cut = (load_file(path / "last.pth") for path in (folder, tmp_path / "run"))
    assert cut["epoch"] == 2 and any(name.startswith("auxiliary_head.") for name in whole["model"])
    assert not any(name.startswith("auxiliary_head.") for name in whole["averaged"])
    for entry in ("model", "averaged"):
        assert whole[entry].keys() == cut[entry].keys()
        assert all(torch.equal(value, cut[entry][name]) for name, value in whole[entry].items())
    moments = [[state["exp_avg"] for state in x["optimizer"]["state"].values()] for x in (whole, cut)]
    assert len(moments[0]) > 20 and all(map(torch.equal, *moments))
    losses = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    epochs = [row["loss_semantic"] for row in losses if row["kind"] == "epoch"]
    assert 0 < epochs[1] < epochs[0] < 0.5 * torch.tensor(6.0).log()


def test_files_are_read_as_those_of_a_plain_model(
    run: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = load_file(run[1] / "last.pth")
    del content["averaged"], content["updates"]  # as a run without an average writes it
    torch.save(content, tmp_path / "run.pth")
    torch.save(content["model"], tmp_path / "bare.pth")  # as a training loop of one's own may write it
    plain = {name: value for name, value in content["model"].items() if not name.startswith("auxiliary_head.")}
    assert len(plain) < len(content["model"])
    with caplog.at_level(logging.WARNING, "solov2"):
        assert convert_main([str(tmp_path / "run.pth"), str(tmp_path / "out.pth")]) == 0
        models = [build_model(weights=tmp_path / name) for name in ("run.pth", "out.pth")]
        models.append(build_model(tiny_config(), weights=tmp_path / "bare.pth"))
    assert not caplog.records
    assert load_file(tmp_path / "out.pth")["model"].keys() == plain.keys()
    for model in models:
        assert model.auxiliary_head is None and list(model.train()(torch.zeros(2, 3, 64, 64))) == RAW
        assert model.state_dict().keys() == plain.keys()
        parameters = dict(model.named_parameters())
        assert all(torch.equal(plain[name], parameters[name]) for name in parameters)


def test_resuming_and_fine_tuning_with_another_setting(
    run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, folder = run
    last = str(folder / "last.pth")
    off = (*ON, "train.semantic_auxiliary=0")
    assert train_main(command(data, tmp_path / "off", *off, words=("--resume", last))) == 2
    assert "train.semantic_auxiliary" in capsys.readouterr().err and not (tmp_path / "off").exists()
    once = ("train.epochs=1", "train.checkpoint_steps=0", "train.ema_decay=0")
    assert train_main(command(data, tmp_path / "tuned", *ON, *once, words=("--weights", last))) == 0
    tuned = load_file(tmp_path / "tuned" / "last.pth")
    assert tuned["model"].keys() == load_file(last)["model"].keys()
    torch.save({**tuned, "model": load_file(last)["averaged"]}, tmp_path / "plain.pth")
    capsys.readouterr()
    words = ("--resume", str(tmp_path / "plain.pth"))
    assert train_main(command(data, tmp_path / "on", *ON, words=words)) == 2
    assert "train.semantic_auxiliary" in capsys.readouterr().err and not (tmp_path / "on").exists()
