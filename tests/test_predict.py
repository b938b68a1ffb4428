"""The command `solov2 predict`: outputs match inputs, nothing is overwritten, bad files are named."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import save_content
from PIL import Image

from solov2.build import build_model
from solov2.commands.predict import main
from solov2.config import load_config
from solov2.data.panoptic_file import open_annotations
from solov2.errors import InputError
from solov2.models.solov2 import SOLOv2
from solov2.ops import images
from solov2.ops.masks import decode_rle, encode_rle
from solov2.outputs import check_outputs
from solov2.prediction import run as loop
from solov2.prediction import writers
from solov2.prediction.sources import Source, find_sources, plan_jobs
from solov2.tiles import predict_tiles
from solov2.views import parse_views, predict_views
from solov2.visualize_panoptic import draw_panoptic

NAMES = ["disc", "ring", "square", "star"]
STUFF = ["sky", "grass", "road"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained network with category and kernel weights so large that it finds something everywhere."""
    torch.manual_seed(0)
    model = build_model("quickstart")
    torch.nn.init.zeros_(model.head.category_predictor.bias)
    torch.nn.init.normal_(model.head.category_predictor.weight, std=6.0)
    torch.nn.init.normal_(model.head.kernel_predictor.weight, std=6.0)
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    config = load_config("quickstart").to_dict()
    save_content(path, {"model": model.state_dict(), "config": config, "class_names": NAMES, "traits": {}})
    return path


@pytest.fixture(scope="module")
def panoptic_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for things and three kinds of stuff; category ids are not in the order of the labels."""
    shape = {"num_stuff": 3, "semantic_channels": 32, "max_instances": 12, "input_scale": [96, 96]}
    config = load_config("quickstart", {**shape, "stuff_area_limit": 30})
    torch.manual_seed(0)
    model = build_model(config)
    torch.nn.init.zeros_(model.head.category_predictor.bias)
    predictors = model.head.category_predictor, model.head.kernel_predictor, model.semantic_head.predictor
    for predictor in predictors:
        torch.nn.init.normal_(predictor.weight, std=3.0)
    path = tmp_path_factory.mktemp("weights") / "panoptic.pth"
    content = {"model": model.state_dict(), "config": config.to_dict(), "class_names": NAMES, "traits": {}}
    ids = {"category_ids": [7, 3, 5, 4], "stuff_names": STUFF, "stuff_category_ids": [30, 10, 20]}
    save_content(path, content | ids)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate(("b.png", "a.jpg", "c.bmp")):
        noise = np.random.default_rng(number).integers(0, 256, (90 + 10 * number, 120, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    (folder / "._a.jpg").write_text("what macOS leaves on foreign disks")
    return folder


def run(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def test_folder_with_results(weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(
        photos,
        "--weights",
        weights,
        "--output",
        tmp_path / "out",
        "--results",
        tmp_path / "out" / "found.json",
        "--max-instances",
        "5",
        "--batch-size",
        "2",
        "--score-threshold",
        "0.4",
    )
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.jpg", "b.png", "c.png", "found.json"]
    with Image.open(photos / "b.png") as before, Image.open(tmp_path / "out" / "b.png") as after:
        assert after.size == before.size
        assert after.tobytes() != before.tobytes()
    entries = json.loads((tmp_path / "out" / "found.json").read_text())
    files = [Path(entry["file_name"]).name for entry in entries]
    assert files == ["a.jpg"] * 5 + ["b.png"] * 5 + ["c.bmp"] * 5
    assert all(NAMES[entry["category_id"] - 1] == entry["category_name"] for entry in entries)
    assert all(entry["score"] >= 0.4 for entry in entries)
    output = capsys.readouterr().out
    assert all(f"{photos / name}: " in output for name in ("a.jpg", "b.png", "c.bmp"))


def test_results_equal_the_predictions_of_the_model(weights: Path, photos: Path, tmp_path: Path) -> None:
    arguments = ("--weights", weights, "--output", tmp_path, "--device", "cpu", "--results", tmp_path / "found.json")
    assert run(photos / "b.png", *arguments) == 0
    entries = json.loads((tmp_path / "found.json").read_text())
    (result,) = build_model(weights=weights).predict([photos / "b.png"], score_threshold=0.3)
    assert [entry["score"] for entry in entries] == pytest.approx(result["scores"].tolist(), abs=1e-6)
    assert [entry["category_name"] for entry in entries] == [NAMES[label] for label in result["labels"].tolist()]
    assert [entry["segmentation"] for entry in entries] == encode_rle(result["masks"])
    x, y, width, height = entries[0]["bbox"]
    assert result["boxes"][0].tolist() == [x, y, x + width, y + height]
    assert decode_rle(entries[0]["segmentation"]).shape == (90, 120)


def test_nothing_found_is_reported_and_the_image_is_unchanged(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(photos / "b.png", "--weights", weights, "--output", tmp_path, "--score-threshold", "1") == 0
    assert "nothing found" in capsys.readouterr().out
    with Image.open(photos / "b.png") as before, Image.open(tmp_path / "b.png") as after:
        assert after.tobytes() == before.tobytes()


def test_exif_orientation_is_applied(weights: Path, tmp_path: Path) -> None:
    image = Image.new("RGB", (120, 80))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated by 90 degrees
    image.save(tmp_path / "phone.jpg", exif=exif)
    arguments = ("--weights", weights, "--output", tmp_path / "out", "--results", tmp_path / "found.json")
    assert run(tmp_path / "phone.jpg", *arguments, "--score-threshold", "0") == 0
    with Image.open(tmp_path / "out" / "phone.jpg") as picture:
        assert picture.size == (80, 120)
        assert not picture.getexif().get(0x0112)
    assert json.loads((tmp_path / "found.json").read_text())[0]["segmentation"]["size"] == [120, 80]


def test_a_broken_image_does_not_stop_the_others(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "aa.jpg").write_bytes((photos / "a.jpg").read_bytes()[:900])
    assert run(photos, "--weights", weights, "--output", tmp_path / "out", "--batch-size", "2") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.jpg", "b.png", "c.png"]
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1 and "aa.jpg" in errors[0]


def test_inputs_and_existing_outputs_are_not_overwritten(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (photos / "a.jpg").read_bytes()
    assert run(photos / "a.jpg", "--weights", weights, "--output", photos, "--overwrite") == 2
    assert "would replace the input" in capsys.readouterr().err
    assert (photos / "a.jpg").read_bytes() == before

    out = tmp_path / "out"
    out.mkdir()
    (out / "a.jpg").write_bytes(b"mine")
    assert run(photos, "--weights", weights, "--output", out) == 2
    assert "a.jpg already exists" in capsys.readouterr().err
    assert (out / "a.jpg").read_bytes() == b"mine" and len(list(out.iterdir())) == 1
    assert run(photos / "a.jpg", "--weights", weights, "--output", out, "--overwrite") == 0
    assert (out / "a.jpg").read_bytes() != b"mine"

    (tmp_path / "found.json").write_text("mine")
    arguments = (photos / "b.png", "--weights", weights, "--output", out, "--results", tmp_path / "found.json")
    assert run(*arguments) == 2
    assert (tmp_path / "found.json").read_text() == "mine" and not (out / "b.png").exists()


def test_equal_names_give_distinct_outputs(tmp_path: Path) -> None:
    paths = [str(tmp_path / path) for path in ("x/a.jpg", "y/a.jpg", "y/A.JPG", "y/a.bmp", "z/a.png")]
    sources = [Source(path) for path in paths]
    assert [job.picture.name for job in plan_jobs(sources)] == ["a.jpg", "a_2.jpg", "A_3.JPG", "a.png", "a_2.png"]
    assert [job.source.name for job in plan_jobs(sources)] == paths
    assert [job.number for job in plan_jobs(sources)] == [1, 2, 3, 4, 5]
    jobs = plan_jobs(sources, unique_stems=True)
    assert [job.picture.name for job in jobs] == ["a.jpg", "a_2.jpg", "A_3.JPG", "a_4.png", "a_5.png"]
    apart = [Source(path, folder=Path(Path(path).parent.name)) for path in paths]
    pictures = [str(job.picture) for job in plan_jobs(apart)]
    assert pictures == ["x/a.jpg", "y/a.jpg", "y/A_2.JPG", "y/a.png", "z/a.png"]


def test_places_where_no_picture_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "a.jpg").mkdir()
    for name, folder in (("b.jpg", "file"), ("a.jpg", "")):
        [job] = plan_jobs([Source(f"photos/{name}", folder=Path(folder))])
        with pytest.raises(InputError, match=f"{folder or 'a.jpg'} is "):
            check_outputs([("--output", tmp_path / job.picture)], overwrite=True)


def test_finding_sources(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole = [Source(str(photos / name)) for name in ("a.jpg", "b.png", "c.bmp")]
    assert find_sources([photos], out) == whole
    again = [
        Path(source.name).name for source in find_sources([photos / "b.png", photos, photos / ".." / "photos"], out)
    ]
    assert again == ["b.png", "a.jpg", "c.bmp"]
    [text] = find_sources([photos / "notes.txt"], out)  # by name: its reading tells
    assert text == Source(str(photos / "notes.txt"))
    assert find_sources([photos], photos) == whole
    (tmp_path / "empty").mkdir()
    for path, words in (
        (tmp_path / "empty", "contains no images"),
        (tmp_path / "nowhere.jpg", r"nowhere\.jpg does not exist"),
        (photos / "*.tif", r"no file matches .*\.tif"),
        ("ftp://example.org/a.jpg", "is a URL"),
        ("/dev/null", "not a regular file"),
    ):
        with pytest.raises(InputError, match=words):
            find_sources([path], out)


def test_subfolders_and_a_second_run(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Subfolders are kept, what is passed over is counted, and earlier pictures are no images."""
    inner = photos / "day 1" / "left"
    inner.mkdir(parents=True)
    Image.open(photos / "a.jpg").save(inner / "d.jfif", format="JPEG")
    Image.open(photos / "a.jpg").save(inner / "a.jpg")
    (photos / "scan.pdf").write_text("no image")
    arguments = (photos, "--weights", weights, "--output", photos / "found", "--results", tmp_path / "found.json")
    for _ in range(2):
        assert run(*arguments, "--overwrite", "--max-instances", "1") == 0
        written = {str(path.relative_to(photos / "found")) for path in (photos / "found").rglob("*.*")}
        assert written == {"a.jpg", "b.png", "c.png", "day 1/left/a.jpg", "day 1/left/d.png"}
        files = [entry["file_name"] for entry in json.loads((tmp_path / "found.json").read_text())]
        assert files == [str(path) for path in sorted([*photos.glob("[abc].*"), inner / "a.jpg", inner / "d.jfif"])]
        error = capsys.readouterr().err
        assert "2 files" in error and "1 .txt" in error and "1 .pdf" in error


def test_the_limit_of_pixels_is_a_setting(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """a.jpg has 120 x 100 pixels, b.png 120 x 90, c.bmp 120 x 110."""
    limit = ("--set", "data.max_image_pixels=12000")
    assert run(photos, "--weights", weights, "--output", tmp_path / "out", "--batch-size", "2", *limit) == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.jpg", "b.png"]
    error = capsys.readouterr().err
    assert "c.bmp has 120 x 110 pixels" in error and "12000" in error and "max_image_pixels" in error


def test_names_cannot_steer_a_terminal(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = b"a\xff\x1b[31m\n.jpg".decode("utf-8", "surrogateescape")
    (photos / "a.jpg").rename(photos / name)
    (photos / f"broken{name}").write_bytes(b"")
    arguments = ("--weights", weights, "--output", tmp_path / "out", "--results", tmp_path / "found.json")
    assert run(photos, *arguments, "--max-instances", "1") == 1
    output = "".join(capsys.readouterr())
    assert "\x1b[31m" not in output and "\\x1b[31m\\n.jpg" in output and (tmp_path / "out" / name).is_file()
    entries = json.loads((tmp_path / "found.json").read_text())
    assert str(photos / name) in [entry["file_name"] for entry in entries]


def test_an_animation_is_drawn_by_its_first_frame(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Image.open(photos / "b.png") as image:
        image.save(photos / "moving.gif", save_all=True, append_images=[image.rotate(180)])
    assert run(photos / "moving.gif", "--weights", weights, "--output", tmp_path, "--score-threshold", "1") == 0
    assert "moving.gif" in capsys.readouterr().err
    with Image.open(photos / "moving.gif") as before, Image.open(tmp_path / "moving.png") as after:
        assert after.tobytes() == before.convert("RGB").tobytes()


def test_mistakes_are_one_line(weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = photos / "a.jpg"
    for arguments, word in (
        ((tmp_path / "gone.jpg", "--weights", weights), "gone.jpg"),
        ((image, "--weights", tmp_path / "gone.pth"), "gone.pth"),
        ((image, "--weights", weights, "--config", "quikstart"), "quickstart"),
        ((image, "--weights", weights, "--device", "abacus"), "abacus"),
        ((image, "--weights", image), "a.jpg"),
    ):
        assert run(*arguments, "--output", tmp_path / "out") == 2
        output = capsys.readouterr()
        assert output.err.startswith("error: ") and output.err.count("\n") == 1 and word in output.err
        assert not (tmp_path / "out").exists()
    for option in (("--score-threshold", "1.5"), ("--batch-size", "0"), ("--max-instances", "-1"), ("--json", "x")):
        assert run(image, "--weights", weights, *option, "--output", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and option[0].strip("-").replace("-", "_") in error.replace("-", "_")


def test_results_on_the_screen_and_settings(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Standard output holds nothing but JSON; --set and --precision reach the network."""
    found = []
    for more in ((), ("--precision", "bf16"), ("--set", "model.input_scale=[96,96]")):
        out = tmp_path / f"out{len(found)}"
        assert run(photos / "b.png", "--weights", weights, "--output", out, "--results", "-", *more) == 0
        output = capsys.readouterr()
        found.append([entry["score"] for entry in json.loads(output.out)])
        assert "b.png: " in output.err
    assert found[0] != found[1] and found[0] != found[2] and not (tmp_path / "-").exists()


def test_tiles_and_views(
    weights: Path, panoptic_weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They reach the results, as the functions for Python give them; panoptic models refuse both."""
    model = build_model(weights=weights, score_threshold=0.1, max_instances=4, input_scale=[64, 64], max_candidates=40)
    shared = (photos / "b.png", "--weights", weights, "--device", "cpu", "--results", "-", "--max-instances", "4",
              "--score-threshold", "0.1",
              "--set", "model.input_scale=[64,64]", "--set", "model.max_candidates=40")  # fmt: skip
    views = parse_views("flip,0.75")
    for more, expected in (
        (("--tile", "64"), predict_tiles(model, photos / "b.png", 64)),
        (("--tta", "flip,0.75"), next(predict_views(model, [photos / "b.png"], views))),
        (("--tta", "flip,0.75", "--tile", "64"), predict_tiles(model, photos / "b.png", 64, views=views)),
    ):
        assert run(*shared, "--output", tmp_path / "-".join(more), *more) == 0
        entries = json.loads(capsys.readouterr().out)
        assert [entry["segmentation"] for entry in entries] == expected["masks"] and len(entries) > 0
    for more in (("--tile", "64"), ("--tta", "flip")):
        assert run(photos / "b.png", "--weights", panoptic_weights, "--output", tmp_path / "p", *more) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "panoptic" in error
    assert run(*shared, "--output", tmp_path / "p", "--tta", "flop") == 2
    assert "flop" in capsys.readouterr().err and not (tmp_path / "p").exists()


def test_a_cpu_does_one_thing_at_a_time() -> None:
    assert [loop._images_ahead(torch.device(kind), 3) for kind in ("cpu", "cuda", "mps")] == [0, 3, 3]


@pytest.fixture
def eight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight images, with threads that work ahead as on an accelerator."""
    monkeypatch.setattr(loop, "_images_ahead", lambda device, batch_size: batch_size)
    folder = tmp_path / "eight"
    folder.mkdir()
    for number in range(8):
        Image.new("RGB", (64, 64), (30 * number, 0, 0)).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("batch_size", [1, 2])
def test_reading_and_writing_overlap_the_network_in_bounded_memory(
    batch_size: int,
    weights: Path,
    eight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each step waits for one that only runs if the two overlap; while a picture is slow, reading stops, too."""
    events: list[str] = []
    changed = threading.Condition()

    def happened(event: str) -> None:
        with changed:
            events.append(event)
            changed.notify_all()

    def wait_for(event: str) -> None:
        with changed:
            assert changed.wait_for(lambda: event in events, timeout=20), (event, events)

    read, forward, write = images.to_rgb_tensor, SOLOv2.forward, writers.write_picture

    def slow_read(path: Path, **limits: int) -> torch.Tensor:
        happened(f"read {path.stem}")
        return read(path, **limits)

    def slow_forward(model: SOLOv2, pixels: torch.Tensor) -> dict[str, Any]:
        if "network" not in events:
            wait_for(f"read {batch_size}")  # an image of the next batch
        happened("network")
        return forward(model, pixels)

    def slow_write(path: Path, picture: Image.Image) -> None:
        if path.stem == "0":
            wait_for(f"read {3 * batch_size - 1}")  # for the batch after the next, while the next is in the network
            time.sleep(0.3)
            assert sum(event.startswith("read") for event in events) == 3 * batch_size
            assert sum(event == "network" for event in events) == 2
        write(path, picture)
        happened(f"wrote {path.stem}")

    monkeypatch.setattr(images, "to_rgb_tensor", slow_read)
    monkeypatch.setattr(SOLOv2, "forward", slow_forward)
    monkeypatch.setattr(writers, "write_picture", slow_write)
    arguments = ("--weights", weights, "--output", tmp_path / "out", "--results", tmp_path / "found.json")
    assert run(eight, *arguments, "--max-instances", "1", "--batch-size", str(batch_size)) == 0
    for step in ("read", "wrote"):
        assert [event for event in events if event.startswith(step)] == [f"{step} {number}" for number in range(8)]
    lines = [line for line in capsys.readouterr().out.splitlines() if " -> " in line]
    assert [Path(line.split(" -> ")[1]).stem for line in lines] == list("01234567")
    entries = json.loads((tmp_path / "found.json").read_text())
    assert [Path(entry["file_name"]).stem for entry in entries] == list("01234567")


def test_ctrl_c_completes_the_picture_that_is_being_written(
    weights: Path, eight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command waits for its threads and drops what they have not begun."""
    write = writers.write_picture

    def interrupted(path: Path, picture: Image.Image) -> None:
        if path.stem == "2":
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.2)  # the main thread is already on its way out
        write(path, picture)

    monkeypatch.setattr(writers, "write_picture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(eight, "--weights", weights, "--output", tmp_path / "out", "--batch-size", "4")
    for thread in [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]:
        thread.join(timeout=10)
        assert not thread.is_alive()
    assert "interrupted" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.png", "1.png", "2.png", "finished_0.jsonl"]
    for path in (tmp_path / "out").glob("*.png"):
        with Image.open(path) as picture:
            picture.load()


@pytest.mark.parametrize(
    ("place", "error", "code", "word"),
    [
        ("write", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "2.png"), 2, "2.png: No space"),
        ("network", torch.OutOfMemoryError("tried to allocate 2 GiB"), 1, "--batch-size"),
        ("read", MemoryError(), 1, "--batch-size"),
    ],
)
def test_what_stops_the_command(
    place: str,
    error: Exception,
    code: int,
    word: str,
    weights: Path,
    eight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In whichever thread: one sentence, and the pictures before it are complete."""
    module, name = {
        "write": (writers, "write_picture"), "network": (SOLOv2, "forward"), "read": (images, "to_rgb_tensor")
    }[place]  # fmt: skip
    calls, working = [], getattr(module, name)

    def failing(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise error
        return working(*arguments, **named)

    monkeypatch.setattr(module, name, failing)
    assert run(eight, "--weights", weights, "--output", tmp_path / "out") == code
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1 and word in errors[0]
    written = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert written in (["0.png"], ["0.png", "1.png"], ["0.png", "1.png", "3.png"]) and len(calls) < 7


def panoptic_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))


def test_panoptic_results(
    panoptic_weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures, COCO's files beside them that the library reads again, and instances, as the model predicts them."""
    (photos / "more").mkdir()
    Image.open(photos / "a.jpg").save(photos / "more" / "a.jpg")
    Image.open(photos / "b.png").convert("L").save(photos / "a.png")
    out, found = tmp_path / "out", tmp_path / "found.json"
    arguments = (photos, "--panoptic", "--weights", panoptic_weights, "--output", out)
    assert run(*arguments, "--results", found) == 0
    lines = capsys.readouterr().out.splitlines()
    pictures = ["a.jpg", "a_2.png", "b.png", "c.png", "more/a.jpg"]
    stems = [str(Path(name).with_suffix(".png")) for name in pictures]
    assert panoptic_files(out) == sorted([*pictures, "panoptic.json", *(f"panoptic/{name}" for name in stems)])

    written, model = open_annotations(out / "panoptic.json"), build_model(weights=panoptic_weights)
    assert [(c.id, c.name, c.is_thing) for c in written.categories] == [
        *zip([7, 3, 5, 4], NAMES, [True] * 4),
        *zip([30, 10, 20], STUFF, [False] * 3),
    ]
    sources = [photos / name for name in ("a.jpg", "a.png", "b.png", "c.bmp", "more/a.jpg")]
    instances, kinds = json.loads(found.read_text()), set()
    for image_id, (source, result) in enumerate(zip(sources, model.predict_panoptic(sources), strict=True), 1):
        assert (written.read_map(image_id) == result["panoptic_map"].numpy()).all()
        ids = {True: model.category_ids, False: model.stuff_category_ids}
        assert [segment.category_id for segment in written[image_id].segments] == [
            ids[segment["is_thing"]][segment["label"]] for segment in result["segments"]
        ]
        things = [NAMES[segment["label"]] for segment in result["segments"] if segment["is_thing"]]
        stuff = [STUFF[segment["label"]] for segment in result["segments"] if not segment["is_thing"]]
        (line,) = [line for line in lines if line.startswith(f"{source}: ")]
        assert all(f"{things.count(name)} {name}" in line for name in things) and all(name in line for name in stuff)
        assert line.endswith(f" -> {out / pictures[image_id - 1]}")
        scores = [entry["score"] for entry in instances if entry["image_id"] == image_id]
        assert scores == pytest.approx([score for score in result["scores"].tolist() if score >= 0.3], abs=1e-6)
        kinds |= {segment["is_thing"] for segment in result["segments"]}
    assert kinds == {True, False}
    with Image.open(photos / "b.png") as before, Image.open(out / "b.png") as after:
        drawn = draw_panoptic(before, model.predict_panoptic(before)[0], model)
        assert after.tobytes() == drawn.tobytes() != before.tobytes()


def test_what_panoptic_pictures_show(
    panoptic_weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The merge's threshold decides, unless --score-threshold keeps more instances from it; --set reaches it."""

    def things(*more: str) -> list[float]:
        arguments = (photos / "b.png", "--panoptic", "--weights", panoptic_weights, "--output", tmp_path, "--overwrite")
        assert run(*arguments, *more) == 0
        (annotation,) = json.loads((tmp_path / "panoptic.json").read_text())["annotations"]
        return [segment["score"] for segment in annotation["segments_info"] if segment["isthing"]]

    usual, fewer = things(), things("--set", "model.panoptic_score_threshold=0.35")
    assert min(usual) >= 0.3 and min(fewer) >= 0.35 and 0 < len(fewer) < len(usual)
    assert things("--score-threshold", "0.35") == fewer
    lower = ("model.panoptic_score_threshold=0.1", "model.panoptic_overlap_threshold=1", "model.max_instances=60")
    assert 0.1 <= min(things(*(word for setting in lower for word in ("--set", setting)))) < 0.3
    capsys.readouterr()
    assert things("--score-threshold", "1", "--set", "model.stuff_area_limit=1000000") == []
    assert "nothing found" in capsys.readouterr().out
    with Image.open(photos / "b.png") as before, Image.open(tmp_path / "b.png") as after:
        assert after.tobytes() == before.tobytes()


def test_panoptic_files_are_checked_first(
    weights: Path, panoptic_weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, out = photos / "b.png", tmp_path / "out"
    assert run(photos / "gone.png", image, "--panoptic", "--weights", weights, "--output", out) == 2
    assert "gone.png" in capsys.readouterr().err
    assert run(image, "--panoptic", "--weights", weights, "--output", out) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "panoptic model" in error and not out.exists()
    for name in ("panoptic.json", "panoptic/b.png"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
        assert run(image, "--panoptic", "--weights", panoptic_weights, "--output", out) == 2
        assert f"{name} already exists" in capsys.readouterr().err
        assert run(image, "--weights", panoptic_weights, "--output", out, "--overwrite") == 0  # instances, as ever
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
        (out / "b.png").unlink()
    capsys.readouterr()
    arguments = ("--panoptic", "--weights", panoptic_weights, "--output", out, "--overwrite")
    assert run(image, *arguments, "--results", out / "panoptic.json") == 2
    assert "would replace the output" in capsys.readouterr().err
    assert run(image, *arguments) == 0 and 1 in open_annotations(out / "panoptic.json")


def test_ctrl_c_leaves_complete_panoptic_files(
    panoptic_weights: Path, eight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = writers.write_picture

    def interrupted(path: Path, picture: Image.Image) -> None:
        if path.stem == "2":
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.2)  # the main thread is already on its way out
        write(path, picture)

    monkeypatch.setattr(writers, "write_picture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(eight, "--panoptic", "--weights", panoptic_weights, "--output", tmp_path / "out", "--batch-size", "4")
    names = ["0.png", "1.png", "2.png"]
    (tmp_path / "out" / "finished_0.jsonl").unlink()
    assert panoptic_files(tmp_path / "out") == [*names, "panoptic.json", *(f"panoptic/{name}" for name in names)]
    written = open_annotations(tmp_path / "out" / "panoptic.json")
    assert all(written.read_map(image_id).shape == (64, 64) for image_id in (1, 2, 3)) and 4 not in written


def test_the_module_runs(weights: Path, photos: Path, tmp_path: Path, repo_root: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "solov2",
        "predict",
        str(photos / "b.png"),
        "--weights",
        str(weights),
        "--output",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "b.png: " in done.stdout and (tmp_path / "out" / "b.png").is_file()
