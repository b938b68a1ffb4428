"""A class is known by its name: in evaluation, validation, fine-tuning and resuming, whatever its id and position."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import save_content
from helpers.tiny_runs import arguments, tiny_config

from solov2.build import build_model, construct
from solov2.checkpoint import load_file
from solov2.commands.evaluate import main as evaluate_main
from solov2.commands.train import main as train_main
from solov2.data.class_matching import can_match, check_categories, distinct_names, match_names, similar_names
from solov2.data.coco import CocoInstances
from solov2.errors import InputError
from solov2.evaluation.coco import CocoEvaluator
from solov2.evaluation.picture import draw_predictions

BIAS, WEIGHT = "head.category_predictor.bias", "head.category_predictor.weight"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(folder of a generated dataset, run folder of one epoch on it), whose weights then predict all classes."""
    root = tmp_path_factory.mktemp("identity")
    words = ["--epochs", "1", "--set", "data.workers=0", "--set", "train.picture_images=0"]
    assert train_main([*arguments(root / "data", root / "run"), *words]) == 0
    content = load_file(root / "run" / "last.pth")
    content["model"][WEIGHT].normal_(generator=torch.Generator().manual_seed(0))
    torch.save(content, root / "run" / "last.pth")
    return root / "data", root / "run"


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of an annotation file with `change` applied to its content."""
    content = json.loads(source.read_text())
    change(content)
    target.write_text(json.dumps(content))
    return target


def permute(content: dict[str, Any]) -> None:
    """Reverse the order of the categories and give them other ids; what is annotated stays the same."""
    ids = {category["id"]: 100 - category["id"] for category in content["categories"]}
    for category in content["categories"]:
        category["id"] = ids[category["id"]]
    for annotation in content["annotations"]:
        annotation["category_id"] = ids[annotation["category_id"]]


def drop_disc(content: dict[str, Any]) -> None:
    """Remove the first category and its annotations."""
    [disc] = [category["id"] for category in content["categories"] if category["name"] == "disc"]
    content["categories"] = [category for category in content["categories"] if category["id"] != disc]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] != disc]


def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    """A change that renames a category."""

    def change(content: dict[str, Any]) -> None:
        for category in content["categories"]:
            category["name"] = new if category["name"] == old else category["name"]

    return change


def evaluated(data: tuple[Path, Path], annotations: Path, *more: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(figures, instances) of the run's weights on an annotation file of the validation images."""
    folder = annotations.parent
    words = ["--weights", str(data[1] / "last.pth"), "--val-annotations", str(annotations), "--data-root", str(data[0])]
    words += ["--json", str(folder / "figures.json"), "--results", str(folder / "results.json"), "--overwrite"]
    words += ["--per-class", "--device", "cpu", "--workers", "0", "--set", "model.score_threshold=0.0"]
    words += ["--set", "model.max_instances=20"]
    assert evaluate_main([*words, *more]) == 0
    return json.loads((folder / "figures.json").read_text()), json.loads((folder / "results.json").read_text())


def test_names_are_matched_once_and_exactly() -> None:
    assert match_names(["a", "b"], ["b", "c", "a"]) == [2, 0]
    assert match_names(["a", "A", "a "], ["a", "b"]) == [0, None, None]
    assert match_names(["a", "a", "b"], ["a", "a", "b"]) == [0, 1, 2]  # equal lists: one to one
    assert match_names(["a", "a", "b"], ["b", "a"]) == [None, None, 0]
    assert match_names(["a", "b"], ["b", "a", "a"]) == [None, 0]
    assert not can_match(None, ["a"]) and not can_match(["class 0", "class 1"], ["a", "b"])
    assert can_match(["class 0", "class 1"], ["class 1", "class 0"]) and can_match(["a"], ["b"])
    assert distinct_names(["a", "b", "a", "a (2)", "a"]) == ["a", "b", "a (3)", "a (2)", "a (4)"]
    assert "'Traffic_Light' the same as 'traffic light'" in similar_names(["Traffic_Light", "bus"], ["traffic light"])
    assert similar_names(["bus"], ["car"]) == ""


def test_other_ids_and_order_give_the_same_figures(data: tuple[Path, Path], tmp_path: Path, caplog) -> None:
    source = data[0] / "annotations" / "instances_val2017.json"
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    figures, found = evaluated(data, rewritten(source, tmp_path / "a" / "val.json", lambda _: None))
    permuted, moved = evaluated(data, rewritten(source, tmp_path / "b" / "val.json", permute))
    for name in ("segm", "bbox", "per_class"):
        assert permuted[name] == figures[name], name
    assert [{**entry, "category_id": 100 - entry["category_id"]} for entry in moved] == found  # ids of its own file
    assert len({entry["category_id"] for entry in found}) > 1  # an exchange of classes would show
    assert "matched by name" not in caplog.text


def test_classes_of_one_side_only(data: tuple[Path, Path], tmp_path: Path, caplog) -> None:
    """Unknown to the model: AP 0. Unknown to the file: predictions are dropped. Both are named."""
    source = data[0] / "annotations" / "instances_val2017.json"
    for name in ("whole", "renamed", "subset"):
        (tmp_path / name).mkdir()
    whole, everything = evaluated(data, rewritten(source, tmp_path / "whole" / "val.json", lambda _: None))
    plate = rewritten(source, tmp_path / "renamed" / "val.json", rename("disc", "Disc"))
    figures, found = evaluated(data, plate)
    assert figures["per_class"]["Disc"] == {"segm_AP": 0.0, "bbox_AP": 0.0}
    assert figures["per_class"]["star"] == whole["per_class"]["star"]
    [disc] = [c["id"] for c in json.loads(plate.read_text())["categories"] if c["name"] == "Disc"]
    assert found == [entry for entry in everything if entry["category_id"] != disc] and 0 < len(found) < len(everything)
    assert all(part in caplog.text for part in ("know Disc (", "lacks disc (", "'Disc' the same as 'disc'", "last.pth"))
    caplog.clear()
    figures, found = evaluated(data, rewritten(source, tmp_path / "subset" / "val.json", drop_disc))
    assert set(figures["per_class"]) == {"square", "triangle", "star"}
    assert found == [entry for entry in everything if entry["category_id"] != disc]
    assert "lacks disc (" in caplog.text and "know" not in caplog.text


def test_no_common_name_and_ambiguous_names_are_refused(data: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    source = data[0] / "annotations" / "instances_val2017.json"

    def renamed(content: dict[str, Any]) -> None:
        for number, category in enumerate(content["categories"]):
            category["name"] = f"shape {number}"

    def same_unknown_name(content: dict[str, Any]) -> None:
        for category in content["categories"]:
            category["name"] = "shape"

    words = ["--weights", str(data[1] / "last.pth"), "--data-root", str(data[0]), "--device", "cpu"]
    for change, parts in (
        (renamed, ("shape 0", "disc")),
        (same_unknown_name, ("shape", "disc", "no category")),
        (rename("disc", "star"), ("'star'", "twice")),
    ):
        file = rewritten(source, tmp_path / "val.json", change)
        assert evaluate_main([*words, "--val-annotations", str(file)]) == 2
        errors = capsys.readouterr().err
        assert all(part in errors for part in (str(file), *parts)), errors


def test_weights_without_names_are_matched_by_position(data: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    content = load_file(data[1] / "last.pth")
    for key in ("class_names", "category_ids"):
        del content[key]
    torch.save(content, tmp_path / "unnamed.pth")
    source = data[0] / "annotations" / "instances_val2017.json"
    whole, _ = evaluated(data, rewritten(source, tmp_path / "val.json", lambda _: None))
    unnamed, _ = evaluated(data, tmp_path / "val.json", "--weights", str(tmp_path / "unnamed.pth"))
    assert unnamed["segm"] == whole["segm"]
    file = rewritten(source, tmp_path / "subset.json", drop_disc)
    words = ["--weights", str(tmp_path / "unnamed.pth"), "--val-annotations", str(file), "--data-root", str(data[0])]
    assert evaluate_main([*words, "--device", "cpu"]) == 2
    assert "4 classes" in capsys.readouterr().err


def test_training_validates_by_name(data: tuple[Path, Path], tmp_path: Path, caplog, monkeypatch) -> None:
    """With other ids, another order, and without a class of the training file."""

    class Recorded(CocoEvaluator):
        def __init__(self, coco: Any, category_ids: list[int | None], **settings: Any) -> None:
            known.append([None if i is None else coco.cats[i]["name"] for i in category_ids])
            super().__init__(coco, category_ids, **settings)

    def change(content: dict[str, Any]) -> None:
        permute(content)
        drop_disc(content)

    known: list[list[str | None]] = []
    monkeypatch.setattr("solov2.evaluation.summary.CocoEvaluator", Recorded)
    file = rewritten(data[0] / "annotations" / "instances_val2017.json", tmp_path / "val.json", change)
    words = ["--epochs", "1", "--set", "data.workers=0", "--val-annotations", str(file)]
    assert train_main([*arguments(data[0], tmp_path / "run"), *words]) == 0
    assert known == [[None, "square", "triangle", "star"]] and f"{file} lacks disc (" in caplog.text


def test_the_picture_has_the_models_labels(data: tuple[Path, Path], tmp_path: Path, monkeypatch) -> None:
    source = data[0] / "annotations" / "instances_val2017.json"
    model = build_model(weights=data[1] / "last.pth")
    labels: list[list[list[int]]] = []

    def record(image: Any, result: dict[str, Any], *_: Any, **__: Any) -> Any:
        if isinstance(result["labels"], list):  # the ground truth
            labels[-1].append(result["labels"])
        return draw(image, result, *_, **__)

    from solov2.evaluation.picture import draw_instances as draw

    monkeypatch.setattr("solov2.evaluation.picture.draw_instances", record)
    for change in (lambda _: None, permute):
        labels.append([])
        file = rewritten(source, tmp_path / "val.json", change)
        validation = CocoInstances(file, data[0] / "val2017", training=False)
        draw_predictions(model, validation, count=3, score_threshold=0.9)
    assert labels[0] == labels[1] and len({label for image in labels[0] for label in image}) > 1


def test_resuming_with_another_order_of_classes_is_refused(data: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    shutil.copytree(data[1], tmp_path / "run")
    for change, parts in ((permute, ("another order",)), (rename("disc", "plate"), ("without disc", "with plate"))):
        file = rewritten(data[0] / "annotations" / "instances_train2017.json", tmp_path / "train.json", change)
        words = ["--epochs", "2", "--resume", "--train-annotations", str(file), "--set", "data.workers=0"]
        assert train_main([*arguments(data[0], tmp_path / "run"), *words]) == 2
        errors = capsys.readouterr().err
        assert all(part in errors for part in (*parts, str(file), "--weights")), errors


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Weights of a tiny model with the classes a, b, c, d."""
    torch.manual_seed(0)
    config = tiny_config()
    model = construct(config.model, ["a", "b", "c", "d"])
    torch.nn.init.normal_(model.state_dict()[BIAS])
    content = {"model": model.state_dict(), "config": config.to_dict(), "class_names": model.class_names}
    save_content(tmp_path / "tiny.pth", content)
    return tmp_path / "tiny.pth"


def test_category_rows_move_to_equal_names(saved: Path, caplog) -> None:
    old = load_file(saved)["model"]
    torch.manual_seed(1)
    model = build_model(weights=saved, class_names=["d", "new", "a", "B"])
    state = model.state_dict()
    torch.manual_seed(1)
    fresh = construct(tiny_config().model, ["d", "new", "a", "B"]).state_dict()
    for name in (BIAS, WEIGHT):
        for row, expected in enumerate((old[name][3], fresh[name][1], old[name][0], fresh[name][3])):
            assert torch.equal(state[name][row], expected), (name, row)
    for name in state.keys() - {BIAS, WEIGHT}:
        assert torch.equal(state[name], old[name]), name
    assert model.class_names == ["d", "new", "a", "B"]
    [message] = caplog.messages
    assert all(part in message for part in ("for new, B and", "kept for d, a", "'B' the same as 'b'", str(saved)))
    caplog.clear()
    permuted = build_model(weights=saved, class_names=["b", "a", "d", "c"]).state_dict()
    assert torch.equal(permuted[WEIGHT], old[WEIGHT][[1, 0, 3, 2]]) and not caplog.messages
    more = build_model(weights=saved, class_names=["x", "d", "a", "b", "y"])  # another number of classes
    assert torch.equal(more.state_dict()[WEIGHT][[1, 2, 3]], old[WEIGHT][[3, 0, 1]]) and more.num_classes == 5


def test_without_names_or_with_a_class_count_nothing_is_matched(saved: Path, tmp_path: Path, caplog) -> None:
    content = load_file(saved)
    del content["class_names"]
    save_content(tmp_path / "unnamed.pth", content)
    kept = build_model(weights=tmp_path / "unnamed.pth", class_names=["d", "c", "b", "a"])
    assert torch.equal(kept.state_dict()[WEIGHT], content["model"][WEIGHT]) and kept.class_names == ["d", "c", "b", "a"]
    assert not caplog.messages
    build_model(weights=saved, num_classes=2)
    assert "re-initialized" in caplog.text
    with pytest.raises(InputError, match="2 class names for 3 classes"):
        build_model(weights=saved, class_names=["a", "b"], num_classes=3)


def test_another_shape_of_the_category_layer_is_named(saved: Path) -> None:
    content = load_file(saved)
    content["model"][WEIGHT] = content["model"][WEIGHT][:, :5]
    save_content(saved, content)
    with pytest.raises(InputError, match=WEIGHT):
        build_model(weights=saved, class_names=["d", "a"])


def test_names_that_occur_twice_keep_their_own_row_in_the_table(data: tuple[Path, Path], tmp_path: Path) -> None:
    root, run = data
    val = rewritten(root / "annotations" / "instances_val2017.json", tmp_path / "v.json", rename("star", "disc"))
    words = ["--val-annotations", str(val), "--json", str(tmp_path / "f.json"), "--set", "data.workers=0"]
    words += ["--oracle", "--per-class", "--data-root", str(root), "--device", "cpu"]
    assert evaluate_main(["--config", str(run / "config.yaml"), *words]) == 0
    figures = json.loads((tmp_path / "f.json").read_text())["per_class"]
    assert len(figures) == 4 and {"disc", "disc (2)"} < figures.keys()
    dataset = CocoInstances(val, root / "val2017", training=False)
    check_categories(["disc", "square", "triangle", "disc"], dataset, "a file")  # equal lists: by position
    with pytest.raises(InputError, match="'disc' occurs twice"):
        check_categories(["disc", "square", "triangle", "star"], dataset, "a file")
