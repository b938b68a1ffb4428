"""Videos and cameras: as many frames out as in, of the same size and rate, and an entry for each in other formats."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny_models import save_finder
from PIL import Image

from solov2.build import build_model
from solov2.commands.predict import main
from solov2.errors import InputError
from solov2.prediction import video
from solov2.prediction.sources import Source
from solov2.prediction.video import open_video, video_writer

av = pytest.importorskip("av")
FRAMES, RATE = 100, Fraction(30000, 1001)


def run(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def read(path: Path) -> tuple[list[np.ndarray], Fraction]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)], container.streams.video[
            0
        ].average_rate


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_finder(tmp_path_factory.mktemp("weights") / "small.pth", max_instances=2)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A square that moves to the right, on a background that gets lighter."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    with video_writer(path, RATE) as writer:
        for number in range(FRAMES):
            frame = np.full((48, 80, 3), number, dtype=np.uint8)
            frame[10:30, number // 2 : number // 2 + 20] = (250, 30, 30)
            writer.add(Image.fromarray(frame))
    return path


def test_a_hundred_frames_in_and_out(weights: Path, clip: Path, tmp_path: Path) -> None:
    arguments = (clip, "--weights", weights, "--device", "cpu", "--output", tmp_path, "--batch-size", "8")
    assert run(*arguments, "--format", "pictures,coco,yolo") == 0
    before, rate = read(clip)
    after, rate_after = read(tmp_path / "clip.mp4")
    assert len(before) == len(after) == FRAMES and rate_after == rate == RATE
    assert {frame.shape for frame in after} == {(48, 80, 3)}
    differences = [np.abs(one.astype(int) - other).mean() for one, other in zip(before, after)]
    assert min(differences) > 3  # something is drawn on each
    content = json.loads((tmp_path / "coco.json").read_text())
    assert [image["file_name"] for image in content["images"]] == [
        f"clip.mp4/{number:06d}.png" for number in range(1, FRAMES + 1)
    ]
    assert [image["id"] for image in content["images"]] == list(range(2, FRAMES + 2))
    assert {entry["image_id"] for entry in content["annotations"]} == {*range(2, FRAMES + 2)}
    labels = sorted((tmp_path / "yolo" / "labels" / "clip.mp4").iterdir())
    assert len(labels) == FRAMES and sum(path.read_text().count("\n") for path in labels) == len(content["annotations"])
    [expected] = build_model(weights=weights).predict(
        [Image.fromarray(before[41])], score_threshold=0.3, mask_format="rle"
    )
    found = [entry["segmentation"] for entry in content["annotations"] if entry["image_id"] == 43]
    assert len(found) == len(expected["masks"])
    assert run(*arguments, "--format", "pictures,coco,yolo") == 2  # nothing is overwritten


def test_odd_sizes_and_other_containers(tmp_path: Path) -> None:
    for name in ("a.mkv", "a.avi", "a.mov", "a.m4v"):
        with video_writer(tmp_path / name, Fraction(12)) as writer:
            for _ in range(5):
                writer.add(Image.new("RGB", (33, 17), (10, 200, 30)))
        frames, rate = read(tmp_path / name)
        assert len(frames) == 5 and frames[0].shape == (17, 33, 3) and rate == 12
        assert np.abs(frames[0].reshape(-1, 3).mean(0) - (10, 200, 30)).max() < 4


def test_a_broken_video_does_not_stop_the_others(
    weights: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.mp4").write_bytes(clip.read_bytes()[:300])
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    with av.open(str(tmp_path / "short.mp4"), "w") as container, av.open(str(clip)) as source:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in list(source.demux(video=0))[:3]:
            packet.stream = stream
            container.mux(packet)
    out = tmp_path / "out"
    names = [tmp_path / name for name in ("broken.mp4", "a.png", "short.mp4")]
    assert run(*names, "--weights", weights, "--device", "cpu", "--output", out) == 1
    error = capsys.readouterr().err
    assert "broken.mp4 cannot be read" in error and "not read: 1 of 3 sources" in error
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "short.mp4"]


def test_what_is_refused(clip: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="max_image_pixels"), open_video(Source(str(clip), "video"), 3000):
        pass
    with pytest.raises(InputError, match="camera 97 cannot be read"), open_video(Source("97", "camera"), 10**6):
        pass
    for more in (("--panoptic",), ("--annotations", clip)):
        assert run(clip, "--weights", weights, "--output", tmp_path, *more) == 2

    def missing() -> Any:
        raise InputError("videos and cameras need PyAV: pip install 'solov2[video]'")

    monkeypatch.setattr(video, "_av", missing)
    with pytest.raises(InputError, match=r"solov2\[video\]"), open_video(Source(str(clip), "video"), 10**6):
        pass


def test_a_camera_ends_with_ctrl_c(weights: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the camera: a file whose 12th frame is a Ctrl-C."""

    class Camera:
        FFmpegError = av.error.FFmpegError
        error, VideoFrame = av.error, av.VideoFrame

        @staticmethod
        def open(place: Any, *mode: str, format: str) -> Any:
            if mode:
                return av.open(place, *mode, format=format)
            assert place == "/dev/video3" and format == "v4l2"
            return av.open(str(clip))

    decode = video.frames_of

    def interrupted(container: Any, stream: Any) -> Any:
        for number, frame in enumerate(decode(container, stream)):
            if number == 12:
                raise KeyboardInterrupt
            yield frame

    monkeypatch.setattr(video, "_av", lambda: Camera)
    monkeypatch.setattr(video, "frames_of", interrupted)
    monkeypatch.chdir(tmp_path)
    assert (
        run("3", "--weights", weights, "--device", "cpu", "--output", tmp_path / "out", "--format", "pictures,csv") == 0
    )
    frames, _ = read(tmp_path / "out" / "camera_3.mp4")
    assert len(frames) == 12 and sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "camera_3.mp4", "instances.csv"
    ]  # fmt: skip
