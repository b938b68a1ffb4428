"""Files crafted to do harm: each is refused with one sentence, before it costs memory or time."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.coco_files import CocoTree, png_header, rectangle

from solov2.checkpoint import load_file
from solov2.commands.check_data import main
from solov2.config import load_config
from solov2.data.coco import CocoInstances
from solov2.errors import InputError, printable
from solov2.ops.images import read_header, read_image

HUGE = 10**12


class Bomb:
    """Unpickling it creates a file."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("exploded",)


def saved(content: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def repacked(change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A checkpoint with one tensor of four numbers, each record replaced by `change(name, content)`."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved({"w": torch.ones(4)}))) as source:
        with zipfile.ZipFile(target, "w", compression) as archive:
            for record in source.infolist():
                archive.writestr(record.filename, change(record.filename, source.read(record)))
    return target.getvalue()


def long_integer(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little")


def claim(count: int, *, storage: bool) -> bytes:
    """A checkpoint whose pickle claims `count` elements instead of 4, of the storage or of the tensor."""

    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return data
        place = data.index(b"K\x04") if storage else data.rindex(b"K\x04")
        return data[:place] + long_integer(count) + data[place + 2 :]

    return repacked(change)


def old_format_claim(count: int) -> bytes:
    """The format before zip files, in which the claimed storage is allocated before anything is read into it."""
    data = saved({"w": torch.ones(4)}, _use_new_zipfile_serialization=False)
    place = data.index(b"cpuq") + data[data.index(b"cpuq") :].index(b"K\x04")
    return data[:place] + long_integer(count) + data[place + 2 :]


def old_format_tensor(count: int) -> bytes:
    """The format before zip files, in which a storage grows to what its tensor claims."""
    data = saved({"w": torch.ones(4)}, _use_new_zipfile_serialization=False)
    place = data.rindex(b"K\x04\x85")
    return data[:place] + long_integer(count) + data[place + 2 :]


def overlapping() -> bytes:
    """An archive whose directory lists one record a thousand times."""
    data = saved({"w": torch.ones(2000)})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        start, names = archive.start_dir, archive.namelist()
    end = data.rindex(b"PK\x05\x06")
    directory = data[start:end]
    position = next(i for i, name in enumerate(names) if name.endswith("data/0"))
    entries = [b"PK\x01\x02" + entry for entry in directory.split(b"PK\x01\x02")[1:]]
    directory = directory[: directory.rindex(b"PK\x06\x06")] if b"PK\x06\x06" in directory else directory
    directory += entries[position] * 1000
    count = (len(names) + 1000).to_bytes(2, "little")
    tail = (
        b"PK\x05\x06\0\0\0\0" + count * 2 + len(directory).to_bytes(4, "little") + start.to_bytes(4, "little") + b"\0\0"
    )
    return data[:start] + directory + tail


def crafted(value: bytes, **records: bytes) -> bytes:
    """An archive with the pickle of {"model": value}, `value` in opcodes."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}" + text("model") + value + b"s.")
        for name, data in records.items():
            archive.writestr(f"archive/data/{name}", data)
    return target.getvalue()


def old_format(value: bytes) -> bytes:
    """The same in the format before zip files, without tensors."""
    data = saved({}, _use_new_zipfile_serialization=False)
    place = data.rindex(b"\x80\x02}q\x00.")
    return data[:place] + b"\x80\x02}" + text("model") + value + b"s." + data[place + 6 :]


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def called(name: str, *arguments: bytes) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n(" + b"".join(arguments) + b"tR"


def nested_tuple() -> bytes:
    """A tuple of 2**60 empty tuples, in 300 bytes: hashing or printing it does not end."""
    return b")q\0" + b"".join(b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(60))


def tensor(elements: int) -> bytes:
    number = long_integer(elements)
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number + b"tQ"
    return called("torch._utils _rebuild_tensor_v2", storage, b"K\0", number + b"\x85", b"K\1\x85", b"\x89", b"}")


def one_storage_left_out() -> bytes:
    data = saved({"w": torch.ones(4)}, _use_new_zipfile_serialization=False)
    place = data.rindex(b"\x80\x02]")
    return data[:place] + b"\x80\x02]." + data[place:]


def deep_pickle(name: str, data: bytes) -> bytes:
    return b"\x80\x02}X\x01\0\0\0a" + b"]" * 100_000 + b"a" * 99_999 + b"s." if name.endswith("data.pkl") else data


BOMB_RECORD = bytes(50 * 2**20)
CHECKPOINTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "pickle bomb": (lambda: pickle.dumps(Bomb(), protocol=2), "rejected: .*objects|not a checkpoint"),
    "pickle bomb in an archive": (lambda: saved({"model": Bomb()}), "rejected: .*objects"),
    "pickle bomb in the old format": (
        lambda: saved({"model": Bomb()}, _use_new_zipfile_serialization=False), "rejected: .*objects",
    ),
    "zip bomb": (
        lambda: repacked(lambda name, data: BOMB_RECORD if name.endswith("data/0") else data, zipfile.ZIP_DEFLATED),
        "rejected: .* compressed record, archive/data",
    ),
    "deflated but honest": (
        lambda: repacked(lambda name, data: data, zipfile.ZIP_DEFLATED), "rejected: .* compressed record, archive/data",
    ),
    "overlapping records": (overlapping, "rejected: .*records that claim 8"),
    "no zip directory": (lambda: saved({"w": torch.ones(4)})[:-60], "is truncated"),
    "huge storage": (lambda: claim(HUGE, storage=True), "claims 4000000000000 bytes for storage 0"),
    "huge tensor": (lambda: claim(HUGE, storage=False), r"tensor \[1000000000000\] that is larger"),
    "huge storage, old format": (lambda: old_format_claim(HUGE), "claims 4000000000008 bytes"),
    "huge by a stride of 0": (
        lambda: saved({"model": {"w": torch.zeros(1).expand(HUGE)}}), r"tensor w \[1000000000000\]",
    ),
    "huge without storage": (lambda: saved({"model": [torch.empty(HUGE, device="meta")]}), "rebuild_meta_tensor"),
    "huge and sparse": (
        lambda: saved({"w": torch.sparse_coo_tensor(torch.zeros(1, 1).long(), torch.ones(1), (HUGE,))}),
        "rebuild_sparse",
    ),
    "bytearray": (lambda: crafted(called("__builtin__ bytearray", long_integer(2_900_000_000))), "builtins.bytearray"),
    "bytearray, old format": (
        lambda: old_format(called("__builtin__ bytearray", long_integer(2_900_000_000))), "builtins.bytearray",
    ),
    "tensor class": (lambda: crafted(called("torch FloatTensor", long_integer(10**9))), "torch.FloatTensor"),
    "storage class": (lambda: crafted(called("torch.storage UntypedStorage", long_integer(10**9))), "UntypedStorage"),
    "storage type called": (lambda: crafted(called("torch FloatStorage", long_integer(10**9))), "call of torch.Float"),
    "nested tuple as key": (lambda: crafted(b"}" + nested_tuple() + b"K\1s"), "dictionary whose keys"),
    "nested tuple in a set": (
        lambda: crafted(called("__builtin__ set", b"]" + nested_tuple() + b"a")), "call of builtins.set",
    ),
    "nested tuple called": (lambda: crafted(nested_tuple() + b")R"), "call of an object"),
    "nested tuple as storage": (lambda: crafted(nested_tuple() + b"Q"), "belongs to no tensor"),
    "codec that doubles": (
        lambda: crafted(called("_codecs encode", text("a" * 100), text("hex"))), "call of _codecs.encode",
    ),
    "text encoded twice": (
        lambda: crafted(
            b"(" + text("a" * 100) + b"q\0" + called("_codecs encode", b"h\0", text("latin1")) * 2 + b"t"
        ),
        "call of _codecs.encode",
    ),
    "list copied over and over": (
        lambda: crafted(b"((" + b"K\1" * 20_000 + b"tq\0" + called("torch Size", b"h\0") * 100 + b"t"),
        "1,000,000 opcodes",
    ),
    "iterated tensor": (
        lambda: crafted(called("__builtin__ set", tensor(4)), **{"0": bytes(16)}), "call of builtins.set",
    ),
    "one element too many": (lambda: crafted(tensor(5), **{"0": bytes(16)}), "claims 20 bytes for storage 0"),
    "storage missing in the old format": (one_storage_left_out, "not a checkpoint"),
    "tensor larger than its storage, old format": (lambda: old_format_tensor(HUGE), "larger than its stored data"),
    "two pickles": (
        lambda: repacked(lambda name, data: data).replace(b"archive/byteorder", b"archiv/data.pkl\0\0"),
        "truncated|archive",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = CHECKPOINTS[name]
    path = tmp_path / "hostile.pth"
    path.write_bytes(make())
    with pytest.raises(InputError, match=f"hostile.pth.*({message})") as caught:
        load_file(path)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["hostile.pth"]


def test_zip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.pth"
    path.write_bytes(CHECKPOINTS["zip bomb"][0]())
    assert path.stat().st_size < 2**18
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    with pytest.raises(InputError, match="bomb.pth .*compressed record, .* 52428800"):
        load_file(path)


def test_deep_pickle_does_not_crash(tmp_path: Path) -> None:
    path = tmp_path / "deep.pth"
    path.write_bytes(repacked(deep_pickle))
    content = load_file(path)  # nested lists are harmless: no code recurses into them
    assert list(content) == ["a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: !!python/object/apply:os.mkdir [exploded]", "not valid YAML of plain values"),
        ("model: !!python/name:os.system", "not valid YAML of plain values"),
        ("model: !Thing {a: 1}", "not valid YAML of plain values"),
        ("model: " + "[" * 2_000, "nested too deeply|not valid YAML"),
        (
            "model:\n  num_classes: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
            + "".join(f"  x{n}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 10)}]\n" for n in range(9)),
            "more than 131,072 values",
        ),
        ("name: &a [1, 2]\nbase: *a", r"base .*\[1, 2\]"),
        (
            "data:\n  root:\n    - &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
            + "".join(f"    - &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 10)}]\n" for n in range(9)),
            "more than 131,072 values",
        ),
    ],
    ids=["call", "name", "own tag", "deep", "laughs in unknown keys", "list as base", "laughs in a value"],
)
def test_yaml_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile.yaml").write_text(text)
    with pytest.raises(InputError, match=f"hostile.yaml.*({message})") as caught:
        load_config(tmp_path / "hostile.yaml")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert not (tmp_path / "exploded").exists()


MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{n + 1}: &a{n + 1}\n  <<: [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(9))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (MERGES, "more than 131,072 values"),
        ("train:\n  epochs: 3\n  seed: 1\n  epochs: 4\n", "'epochs' occurs twice, in lines 2 and 4"),
        ("train: {epochs: 3}\ntrain: {seed: 4}", "'train' occurs twice"),
        ("train: {epochs: 3, 'epochs': 4}", "'epochs' occurs twice"),
        ("train:\n\tepochs: 3", "spaces, not tabs"),
        ("train: {epochs: !!int ''}", "not valid YAML"),
        ("train: {winograd: !!bool perhaps}", "not valid YAML"),
        ("train: !!timestamp 5", "not valid YAML"),
        ("train: {epochs: " + "1" * 5000 + "}", "not valid YAML"),
        ("train: {epochs: 3}".encode("utf-16"), "UTF-8"),
        ("#" * 2**17 + "\n", "too large"),
        ("base: fifo", "mine.yaml: base: .*fifo is not a regular file"),
        ("base: fifo.yaml", "mine.yaml: base: .*fifo.yaml is not a regular file"),
        ("base: /dev/zero", "mine.yaml: base: /dev/zero is not a regular file"),
        ("base: device.yaml", "mine.yaml: base: .*device.yaml is not a regular file"),
        ("base: sparse.yaml", "sparse.yaml is too large"),
        (f"base: {'x' * 5000}.yaml", "does not exist"),
    ],
)
def test_more_yaml_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    for name in ("fifo", "fifo.yaml"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "device.yaml").symlink_to("/dev/zero")
    with (tmp_path / "sparse.yaml").open("wb") as file:
        file.truncate(20 * 2**30)
    (tmp_path / "mine.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=message) as caught:
        load_config(tmp_path / "mine.yaml")
    assert "\n" not in str(caught.value)


def test_aliases_and_merges_of_moderate_size_load(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("train: &t\n  epochs: 3\n  seed: 1\ndata: {<<: {workers: 1}, workers: 0}\n")
    config = load_config(tmp_path / "mine.yaml")
    assert (config.train.epochs, config.data.workers) == (3, 0)


@pytest.mark.parametrize("read", [read_header, lambda path, **limit: read_image(path, apply_exif=False, **limit)])
def test_image_size_is_checked_in_the_header(tmp_path: Path, read: Callable) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(50_000, 50_000))
    assert path.stat().st_size < 100
    with pytest.raises(InputError, match="bomb.png: too many pixels"):
        read(path)
    path.write_bytes(png_header(1000, 1000))
    with pytest.raises(InputError, match="bomb.png .*1000 x 1000 .*999999"):
        read(path, max_pixels=999_999)


@pytest.mark.parametrize("name", ["../../x.jpg", "a/../../x.jpg", "/etc/passwd", "a/b/../../../x.jpg"])
def test_file_names_do_not_leave_the_folder(tmp_path: Path, name: str) -> None:
    tree = CocoTree(tmp_path)
    (tmp_path / "x.jpg").write_bytes(b"secret")
    tree.image["file_name"] = name
    tree.file.write_text(json.dumps(tree.content))
    for training in (True, False):
        with pytest.raises(InputError, match="image 1 of .*outside the image folder"):
            CocoInstances(tree.file, tree.images, training=training)
    assert main([str(tree.file), "--images", str(tree.images)]) == 1


def test_names_do_not_write_to_the_terminal() -> None:
    assert printable("a\x1b[2J\nb\ud800é") == "a\\x1b[2J\\nb\\ud800é"


def test_polygon_does_not_fill_the_memory(tmp_path: Path) -> None:
    tree = CocoTree(tmp_path)
    tree.first["segmentation"] = [[0, 0, 2e9, 0, 2e9, 2e9]]
    tree.content["annotations"][2]["segmentation"] = rectangle(-500, -500, 1000, 1000)  # large, but quick to draw
    tree.file.write_text(json.dumps(tree.content))
    with pytest.raises(InputError, match=r"annotation 11 .*2e\+09"):
        CocoInstances(tree.file, tree.images, training=True)
