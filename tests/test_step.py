"""Training steps: accumulation, precision, finite losses, no waiting for the device, and unchanged inputs."""

from __future__ import annotations

import contextlib
import functools
import threading

import pytest
import torch
from helpers.tiny_runs import flat_plan, random_batch, tiny_config
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils import _pytree as pytree

from solov2.build import build_compute, build_criterion, construct, prepare_for_training
from solov2.compute import Compute, SideStream, select_precision
from solov2.data.categories import default_class_names
from solov2.errors import InputError, RunFailed
from solov2.models.layers import DeformConv2d
from solov2.models.solov2 import SOLOv2
from solov2.predict import Predictor
from solov2.training.dry_run import saved_activation_bytes
from solov2.training.epochs import train_one_epoch
from solov2.training.guard import NonFiniteGuard
from solov2.training.optim import WeightAverage, build_optimizer
from solov2.training.step import backward, count_positives, forward, grouped, take_step

CPU = torch.device("cpu")
COMPUTE, CHANNELS_LAST = Compute(CPU), Compute(CPU, memory_format=torch.channels_last)


def train(tmp_path, batches, *, config=None, dtype=torch.float32, compute=COMPUTE, scaler=None, **recipe):
    config = config or tiny_config("model.frozen_batch_norm=true", "model.head_norm=group")
    torch.manual_seed(0)
    model = construct(config.model, list("abcd")).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    plan = flat_plan(len(batches) // recipe.get("accumulate", 1), 0.01, **recipe)
    criterion, guard = build_criterion(config.model), NonFiniteGuard(tmp_path)
    steps = train_one_epoch(
        model, criterion, batches, optimizer, scaler or compute.scaler(), compute, plan, guard, epoch=0
    )
    return model, [done.figures for done in steps]


def joined(first, second):
    """Merge two batches of the same padded size."""
    one, two = first["targets"], second["targets"]
    offset = torch.tensor([len(first["image_ids"]), 0, len(one["masks"])])
    targets = {
        "category": torch.cat([one["category"], two["category"]]),
        "positives": torch.cat([one["positives"], two["positives"] + offset]),
        "masks": torch.cat([one["masks"], two["masks"]]),
        "positives_per_image": one["positives_per_image"] + two["positives_per_image"],
        "instances_per_image": one["instances_per_image"] + two["instances_per_image"],
    }
    batch = {key: torch.cat([first[key], second[key]]) for key in ("pixels", "sizes", "original_sizes")}
    return {**batch, "image_ids": first["image_ids"] + second["image_ids"], "targets": targets}


def test_accumulation_equals_the_large_batch(tmp_path):
    config = tiny_config("model.frozen_batch_norm=true", "model.head_norm=group")
    small = [random_batch(config, seed=seed, instances=count) for seed, count in enumerate((3, 0, 5, 1))]
    large = [joined(*small[:2]), joined(*small[2:])]
    for name in "ab":
        (tmp_path / name).mkdir()
    one, rows_one = train(tmp_path / "a", large, dtype=torch.float64)
    two, rows_two = train(tmp_path / "b", small, dtype=torch.float64, accumulate=2)
    for (name, value), other in zip(one.named_parameters(), two.parameters()):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-11, msg=name)
    assert [row["loss"] for row in rows_one] == pytest.approx([row["loss"] for row in rows_two], rel=1e-6)


def test_four_batches_of_two_equal_a_batch_of_eight(tmp_path):
    config = tiny_config("model.frozen_batch_norm=true", "model.head_norm=group")
    small = [random_batch(config, seed=seed, instances=count) for seed, count in enumerate((3, 0, 5, 1))]
    large = functools.reduce(joined, small)
    assert len(large["image_ids"]) == 8
    for name in "ab":
        (tmp_path / name).mkdir()
    one, _ = train(tmp_path / "a", [large], dtype=torch.float64, clip_norm=35.0)
    two, _ = train(tmp_path / "b", small, dtype=torch.float64, clip_norm=35.0, accumulate=4)
    for (name, value), other in zip(one.named_parameters(), two.parameters()):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-11, msg=name)


def test_loss_falls_and_frozen_parts_do_not_change(tmp_path):
    config = tiny_config("model.frozen_batch_norm=true", "model.head_norm=group", "model.frozen_stages=1")
    torch.manual_seed(0)
    start = construct(config.model, list("abcd"))
    batch = random_batch(config, seed=1)
    model, rows = train(tmp_path, [batch] * 12, config=config, clip_norm=35.0, compute=CHANNELS_LAST)
    assert rows[-1]["loss"] < rows[0]["loss"]
    for (name, before), after in zip(start.state_dict().items(), model.state_dict().values()):
        fixed = (
            "running_" in name
            or "num_batches" in name
            or name.startswith(("backbone.conv1", "backbone.bn1", "backbone.layer1"))
        )
        assert torch.equal(before, after) == fixed, name


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    config = tiny_config()
    batch = random_batch(config, seed=1)
    torch.manual_seed(0)
    model = construct(config.model, list("abcd"))
    model.head.category_predictor.bias.data.fill_(float("nan"))
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.01, fused=True), build_criterion(config.model)
    plan, guard = flat_plan(1, 0.01), NonFiniteGuard(tmp_path)
    steps = train_one_epoch(model, criterion, [batch], optimizer, COMPUTE.scaler(), COMPUTE, plan, guard, epoch=0)
    with pytest.raises(RunFailed, match="step 1 .*category_predictor.bias is not finite"):
        list(steps)


@pytest.mark.parametrize(("precision", "convolutions"), [("float32", "none"), ("tf32", "tf32"), ("bf16", "tf32")])
def test_arithmetic_of_nvidia_cards_is_set_and_restored(precision, convolutions):
    """The flags exist without a GPU. Matrix products stay float32, whatever the caller has chosen."""
    flags = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [flag.fp32_precision for flag in flags]
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(ZeroDivisionError), Compute(torch.device("cuda"), precision).arithmetic():
            assert [flag.fp32_precision for flag in flags] == [convolutions, convolutions, "ieee"]
            assert torch.backends.cudnn.allow_tf32 == (convolutions == "tf32")  # torch's older flags can be read
            raise ZeroDivisionError
        assert [flag.fp32_precision for flag in flags] == [*before[:2], "tf32"]
        with Compute(CPU, precision).arithmetic():
            assert [flag.fp32_precision for flag in flags] == [*before[:2], "tf32"]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before[2]


def test_threads_inside_one_arithmetic_do_not_change_it():
    """An evaluation launches and collects in two threads, each with the same settings."""
    flag, seen, compute = torch.backends.cudnn.conv, set(), Compute(torch.device("cuda"), "float32")
    before = flag.fp32_precision

    def work():
        for _ in range(300):
            with compute.arithmetic():
                seen.add(flag.fp32_precision)

    with compute.arithmetic():
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seen.add(flag.fp32_precision)
    assert seen == {"none"} and flag.fp32_precision == before


@pytest.mark.parametrize(
    ("device", "features", "chosen"),
    [
        ("cpu", {"torch.cpu._is_amx_tile_supported": True, "torch.cpu._is_avx512_bf16_supported": False}, "bf16"),
        ("cpu", {"torch.cpu._is_amx_tile_supported": False, "torch.cpu._is_avx512_bf16_supported": False}, "float32"),
        ("cuda", {"torch.cuda.is_bf16_supported": True}, "bf16"),
        ("cuda", {"torch.cuda.is_bf16_supported": False}, "fp16"),
    ],
)
def test_automatic_precision(monkeypatch, caplog, device, features, chosen):
    for name, value in features.items():
        monkeypatch.setattr(name, lambda value=value, **_options: value)
    with caplog.at_level("INFO", "solov2"):
        assert select_precision("auto", torch.device(device)) == chosen
    assert chosen in caplog.text
    assert select_precision("tf32", torch.device("cpu")) == "float32"  # which has no TF32
    assert select_precision("tf32", torch.device("cuda")) == "tf32"


def test_training_and_prediction_set_the_arithmetic(monkeypatch):
    """In backward passes and post-processing, too."""
    seen = []

    @contextlib.contextmanager
    def arithmetic(self):
        seen.append("in")
        yield
        seen.append("out")

    monkeypatch.setattr(Compute, "arithmetic", arithmetic)
    config, batch = tiny_config(), random_batch(tiny_config(), seed=1)
    model = construct(config.model, list("abcd"))
    model.register_forward_hook(lambda *_: seen.append("forward"))
    model.fpn.lateral[0].weight.register_hook(lambda _gradient: seen.append("backward"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    take_step(model, build_criterion(config.model), [batch], optimizer, COMPUTE.scaler(), COMPUTE, clip_norm=0.0)
    assert seen == ["in", "forward", "backward", "out"]
    seen.clear()
    monkeypatch.setattr(SOLOv2, "postprocess", lambda *_arguments, **_options: seen.append("post-processing"))
    predictor = Predictor(model, COMPUTE)
    predictor.launch({key: batch[key] for key in ("pixels", "sizes", "original_sizes")})
    predictor.collect()
    assert seen == ["in", "forward", "out", "in", "post-processing", "out"]


def test_masks_have_a_queue_of_their_own(monkeypatch):
    """With queues that only record what they are told: no accelerator is needed."""
    told = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def __getattr__(self, method):
            return lambda *arguments: told.append((self.name, method, *(getattr(a, "name", a) for a in arguments)))

        def __enter__(self):
            told.append((self.name, "enter"))

        def __exit__(self, *_error):
            told.append((self.name, "exit"))

    class Recorded:
        def __init__(self, name):
            self.name, self.device = name, torch.device("cuda", 1)

        def record_stream(self, stream):
            told.append((self.name, "is kept for", stream.name))

    monkeypatch.setattr(torch, "Stream", lambda _device: Stream())
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda _device: Stream("main"))
    side = SideStream(torch.device("cuda", 1))
    side.mark()
    with side.after("mark", [Recorded("raw")]):
        told.append("post-processing")
    side.hand_over([Recorded("scores"), torch.zeros(1)])  # a map on the host has no queue
    assert told == [
        ("main", "record_event"),
        ("side", "wait_event", "mark"),
        ("raw", "is kept for", "side"),
        ("side", "enter"),
        "post-processing",
        ("side", "exit"),
        ("main", "wait_stream", "side"),
        ("scores", "is kept for", "main"),
    ]
    told.clear()
    on_cpu = SideStream(CPU)
    with on_cpu.after(on_cpu.mark(), [Recorded("raw")]):
        pass
    on_cpu.hand_over([Recorded("scores")])
    assert told == []


@pytest.mark.parametrize("winograd", [False, True])
def test_recomputed_activations_change_no_bit(winograd):
    """But fewer are kept for the backward pass."""
    steps, kept = [], []
    for recompute in (False, True):
        config = tiny_config(
            "model.frozen_batch_norm=true", "model.head_norm=group", f"train.winograd={winograd}",
            f"train.recompute_activations={recompute}",
        )  # fmt: skip
        torch.manual_seed(0)
        compute = build_compute(config, CPU)
        model = prepare_for_training(construct(config.model, list("abcd")), config, compute).train()
        batch = random_batch(config, seed=1)
        losses = backward(model, build_criterion(config.model), [batch], compute.scaler(), compute)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        steps.append((losses, gradients))
        kept.append(saved_activation_bytes(config, (64, 64), CPU))
    (losses, gradients), (same_losses, same_gradients) = steps
    assert gradients.keys() == same_gradients.keys()
    assert all(torch.equal(gradients[name], same_gradients[name]) for name in gradients)
    assert all(torch.equal(losses[name], same_losses[name]) for name in losses)
    assert kept[1] < 0.8 * kept[0]
    with pytest.raises(InputError, match="recompute_activations"):
        prepare_for_training(model, tiny_config("train.recompute_activations=true", "model.head_norm=batch"), compute)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_steps_are_finite(tmp_path, precision):
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16", init_scale=256.0)
    batch = random_batch(tiny_config(), seed=1, images=1)
    model, rows = train(
        tmp_path, [batch] * 2, config=tiny_config(), compute=Compute(CPU, precision), scaler=scaler, clip_norm=35.0
    )
    assert all(torch.isfinite(value).all() for value in model.parameters())
    assert rows[-1]["loss"] > 0


def test_grouped_drops_an_incomplete_last_group():
    assert list(grouped([1, 2, 3, 4, 5], 2)) == [[1, 2], [3, 4]]


def test_move_does_not_modify_the_batch():
    batch = random_batch(tiny_config(), seed=1)
    moved = Compute(torch.device("meta")).move(batch)
    assert batch["pixels"].device == CPU and batch["targets"]["category"].device == CPU
    assert moved["pixels"].device.type == "meta" and moved["targets"]["masks"].device.type == "meta"
    assert moved["image_ids"] == batch["image_ids"]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize(("accumulate", "instances"), [(1, 3), (2, 3), (1, 0)])
def test_a_step_does_not_wait_for_the_device(tmp_path, precision, accumulate, instances):
    """Fake tensors have no values, so reading one on the host raises."""
    config = tiny_config()
    batches = [random_batch(config, seed=i, instances=instances) for i in range(2 * accumulate)]
    count = count_positives(batches[:accumulate], config.model.num_classes)
    with FakeTensorMode() as mode, pytest.MonkeyPatch.context() as patch:
        # Real batches are on the host and can be counted without waiting; here they are fake, too.
        patch.setattr("solov2.training.step.count_positives", lambda *_: count)
        model = construct(config.model, default_class_names(config.model.num_classes))
        optimizer = build_optimizer(
            model, name="adamw", learning_rate=1e-3, momentum=0.9, weight_decay=1e-4, decay_norms=True
        )
        average = WeightAverage(torch.nn.Identity(), 0.9)  # fake tensors cannot be copied with their module
        average.module = construct(config.model, model.class_names)
        compute = Compute(CPU, precision, torch.channels_last)
        # More steps than there are batches, so that the losses are not read.
        plan = flat_plan(3, 1e-3, log_every=100, clip_norm=35.0, accumulate=accumulate)
        fake = pytree.tree_map_only(torch.Tensor, mode.from_tensor, batches)
        criterion, guard = build_criterion(config.model), NonFiniteGuard(tmp_path)
        for _ in train_one_epoch(model, criterion, fake, optimizer, compute.scaler(), compute, plan, guard, epoch=0):
            average.update(model)
        assert average.updates == 2
        assert len(optimizer.state) == len(list(model.parameters()))  # every parameter took a step
        with pytest.raises(DataDependentOutputException):
            mode.from_tensor(torch.ones(1)).item()


@pytest.mark.parametrize("instances", [3, 0])
def test_forward_pass_and_losses_stay_on_the_device(instances):
    """Fake tensors can be on a GPU that does not exist, and mixing devices in an operation raises."""
    config, device = tiny_config(), torch.device("cuda", 0)
    batch = random_batch(config, seed=0, instances=instances)
    with FakeTensorMode() as mode:
        with device:
            model = construct(config.model, default_class_names(config.model.num_classes))
        losses = forward(
            model,
            build_criterion(config.model),
            pytree.tree_map_only(torch.Tensor, mode.from_tensor, batch),
            (None, None),
            Compute(device, memory_format=torch.channels_last),
        )
        average = WeightAverage(torch.nn.Identity(), 0.9)
        average.module = model
        average.update(model)
        average.update(model)
    assert all(loss.device == device for loss in losses.values())


def test_deformable_convolutions_are_not_deterministic_on_an_accelerator():
    torch.use_deterministic_algorithms(True)
    try:
        with FakeTensorMode(), torch.device("cuda", 0):
            layer, x = DeformConv2d(4, 4, 3, padding=1), torch.empty(1, 4, 8, 8)
            with pytest.raises(RuntimeError, match="no deterministic backward pass on cuda"):
                layer(x)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_does_not_wait_for_the_gpu():
    """The same on a GPU, where torch raises if the host would wait."""
    device, config = torch.device("cuda", 0), tiny_config()
    model = construct(config.model, list("abcd")).to(device)
    optimizer = build_optimizer(
        model, name="adamw", learning_rate=1e-3, momentum=0.9, weight_decay=1e-4, decay_norms=True
    )
    compute = Compute(device, "bf16", torch.channels_last)
    batches = [compute.move(random_batch(config, seed=seed)) for seed in range(3)]  # from pageable memory: waits
    scaler, average = torch.amp.GradScaler("cuda", enabled=False), WeightAverage(model, 0.9)
    average.update(model)
    take_step(
        model, build_criterion(config.model), batches[:1], optimizer, scaler, compute, clip_norm=35.0
    )  # the first step may wait
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[1:]:
            take_step(model, build_criterion(config.model), [batch], optimizer, scaler, compute, clip_norm=35.0)
            average.update(model)
    finally:
        torch.cuda.set_sync_debug_mode(before)
