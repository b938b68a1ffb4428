"""The page of a run through the commands: figures, order of the list, escaping, two runs, a real browser."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from helpers.scenes import plant, rle, scene, shifted
from helpers.tiny_panoptic import panoptic_arguments
from helpers.tiny_runs import arguments

from solov2.commands.evaluate import main as evaluate_main
from solov2.commands.report import main as report_main
from solov2.commands.train import main as train_main
from solov2.report import gather

HOSTILE = "<script>alert(1)</script>"
WORDS = ("--epochs", "3", "--evaluate-every", "1", "--set", "data.workers=0", "--set", "train.picture_images=0")
INSTANCE_SECTIONS = ["Figures", "Training", "Classes", "Scores", "Confusion", "Errors", "Pictures", "Run"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """What a browser would find: headings, tags, addresses, and whether all tags are closed."""

    VOID = {"meta", "img", "line", "rect", "polyline", "circle", "br"}

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(dataset, a run of three epochs), with a class and a file whose names are HTML."""
    folder = tmp_path_factory.mktemp("report")
    data, output = folder / "data", folder / "run"
    assert train_main(arguments(data, folder / "first", "--epochs", "1", *WORDS[2:])) == 0  # generates the data
    for split in ("train", "val"):
        path = data / "annotations" / f"instances_{split}2017.json"
        content = json.loads(path.read_text())
        content["categories"][0]["name"] = HOSTILE
        path.write_text(json.dumps(content))
    words = arguments(data, output, *WORDS, "--set", "data.shapes=false")
    assert train_main(words) == 0
    return data, output


@pytest.fixture(scope="module")
def panoptic_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("panoptic_report")
    assert train_main(panoptic_arguments(folder / "data", folder / "run", *WORDS)) == 0
    return folder / "data", folder / "run"


def report(run: tuple[Path, Path], *words: str) -> int:
    return report_main([str(run[1]), *words, "--data-root", str(run[0]), "--device", "cpu", "--workers", "0"])


def test_the_page_of_a_run(run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, figures = tmp_path / "page.html", tmp_path / "report.json"
    assert report(run, "--output", str(page), "--json", str(figures)) == 0
    shown = Page(page)
    assert shown.headings == [*INSTANCE_SECTIONS, "What to fix first"]
    assert all(address.startswith(("#", "data:image/jpeg;base64,")) for address in shown.addresses)
    assert not {"script", "link", "iframe", "object"} & set(shown.tags)
    text = page.read_text()
    assert HOSTILE not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert page.stat().st_size < 5 * 2**20

    [entry] = json.loads(figures.read_text())["runs"]
    assert evaluate_main(["--weights", str(run[1] / "best.pth"), "--data-root", str(run[0]), "--device", "cpu",
                          "--workers", "0", "--per-class", "--json", str(tmp_path / "eval.json")]) == 0  # fmt: skip
    wanted = json.loads((tmp_path / "eval.json").read_text())
    for kind in ("segm", "bbox"):
        assert entry["figures"][kind] == wanted[kind]
    assert set(entry["figures"]["per_class"]) == set(wanted["per_class"])
    installed = importlib.util.find_spec("faster_coco_eval") is not None
    assert ("boundary" in entry["figures"]) == installed and ("solov2[report]" in text) != installed
    assert entry["ceiling"]["segm"]["AP50"] > entry["figures"]["segm"]["AP50"]
    gains = [finding["gain"] for finding in entry["findings"]]
    assert gains == sorted(gains, reverse=True) and gains[0] > 0.005
    assert f"1. {entry['findings'][0]['area']}" in capsys.readouterr().out


def test_figures_of_lvis(tmp_path: Path) -> None:
    pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval")
    coco, results = scene(7)
    content = coco.dataset
    content["images"] = [{**x, "neg_category_ids": [], "not_exhaustive_category_ids": []} for x in content["images"]]
    content["categories"] = [{**x, "frequency": "rcf"[x["id"] % 3]} for x in content["categories"]]
    (tmp_path / "gt.json").write_text(json.dumps(content))
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = tmp_path / "page.html"
    words = ["--predictions", str(tmp_path / "results.json"), "--val-annotations", str(tmp_path / "gt.json"), "--lvis"]
    assert evaluate_main([*words, "--report", str(page)]) == 0
    assert {"APr", "APc", "APf"} <= set(re.findall(r">(\w+)</th>", page.read_text()))


def test_without_the_extra(run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "has_boundaries", lambda: False)
    page = tmp_path / "page.html"
    assert report(run, "--output", str(page)) == 0
    assert "solov2[report]" in page.read_text() and ">boundary<" not in page.read_text()


def test_the_page_lies_in_the_run_and_is_not_replaced_unasked(
    run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(run) == 0
    page = run[1] / "report.html"
    before = page.read_bytes()
    capsys.readouterr()
    assert report(run) == 2
    assert str(page) in capsys.readouterr().err and page.read_bytes() == before
    assert report(run, "--overwrite") == 0


def test_a_log_that_was_cut_off_and_a_run_without_one(run: tuple[Path, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(run[1] / "best.pth", copy)
    page = tmp_path / "page.html"
    assert report((run[0], copy), "--output", str(page)) == 0
    assert "Training" not in Page(page).headings
    log = (run[1] / "log.jsonl").read_text()
    broken = '\n{"kind": "train", "step": "x", "loss": null}\n[1]\n{"kind": "epoch", "images_per_second": "x"}\n'
    broken += '{"kind": "epoch", "images_per_second": 3, "seconds": null}\n'
    (copy / "log.jsonl").write_text(log[: len(log) // 2] + broken)
    assert report((run[0], copy / "best.pth"), "--output", str(page), "--overwrite") == 0
    assert "Training" in Page(page).headings


@pytest.mark.parametrize("kind", ["run", "panoptic_run"])
def test_two_runs_side_by_side(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    data, output = request.getfixturevalue(kind)
    shutil.copytree(output, tmp_path / "other")
    shutil.copy(output / "last.pth", tmp_path / "other" / "best.pth")
    page = tmp_path / "page.html"
    assert report((data, output), str(tmp_path / "other"), "--output", str(page)) == 0
    text = page.read_text()
    assert Page(page).headings[-1] == "What to fix first"
    assert text.count("change of") == 1 and "Settings that differ" in text and "run: loss" in text
    assert len(re.findall(r'<th scope="col">(?:run|other): (?:mask|PQ) ceiling</th>', text)) == 2


def test_mistakes(run: tuple[Path, Path], panoptic_run: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    page = tmp_path / "page.html"
    for words in ([str(tmp_path / "nothing")], [str(empty)], [str(run[1]), str(run[1])], [str(panoptic_run[1])]):
        assert report(run, *words, "--output", str(page)) == 2
        errors = capsys.readouterr().err.splitlines()
        assert len([line for line in errors if line.startswith("error: ")]) == 1, errors
        assert not page.exists()


def test_weights_without_a_configuration(run: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    """The message names the command that takes the name of a model."""
    bare = tmp_path / "bare.pth"
    torch.save({"model": torch.load(run[1] / "best.pth", weights_only=True)["model"]}, bare)
    assert report((run[0], bare), "--output", str(tmp_path / "page.html")) == 2
    assert "solov2 eval" in capsys.readouterr().err


def test_runs_on_other_annotations_are_not_compared(run: tuple[Path, Path], tmp_path: Path) -> None:
    """Each is evaluated on the data of its own configuration if no other is named."""
    other = tmp_path / "other"
    words = arguments(tmp_path / "more", other, *WORDS, "--set", "data.shapes_seed=1")
    assert train_main(words) == 0
    page = tmp_path / "page.html"
    words = [str(run[1]), str(other), "--device", "cpu", "--workers", "0", "--output", str(page)]
    assert report_main(words) == 2 and not page.exists()
    annotations = [f"--val-annotations={run[0]}/annotations/instances_val2017.json", f"--val-images={run[0]}/val2017"]
    assert report_main([*words, *annotations]) == 0


def test_the_page_of_a_panoptic_run(panoptic_run: tuple[Path, Path], tmp_path: Path) -> None:
    page, figures = tmp_path / "page.html", tmp_path / "report.json"
    assert report(panoptic_run, "--output", str(page), "--json", str(figures)) == 0
    shown = Page(page)
    assert shown.headings == [
        "Figures", "Training", "Classes", "Confusion", "Errors", "Pictures", "Run", "What to fix first",
    ]  # fmt: skip
    [entry] = json.loads(figures.read_text())["runs"]
    assert evaluate_main(["--weights", str(panoptic_run[1] / "best.pth"), "--data-root", str(panoptic_run[0]),
                          "--device", "cpu", "--workers", "0", "--json", str(tmp_path / "eval.json")]) == 0  # fmt: skip
    wanted = json.loads((tmp_path / "eval.json").read_text())
    assert {name: entry["figures"][name] for name in ("all", "things", "stuff")} == {
        name: wanted[name] for name in ("all", "things", "stuff")
    }
    assert entry["ceiling"]["all"]["pq"] > entry["figures"]["all"]["pq"]
    assert {"waves", "bricks", "grain"} <= set(re.findall(r">(\w+)</th>", page.read_text()))


def first_finding(page: Path) -> str:
    """Area and sentence of the first entry of the ranked list."""
    found = re.search(r'<ol class="findings"><li>.*?<span class="area">(.*?)<br>', page.read_text())
    assert found is not None
    return re.sub(r"<[^>]+>", "", found[1])


def test_eval_writes_the_page(run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    words = ["--weights", str(run[1] / "best.pth"), "--data-root", str(run[0]), "--device", "cpu", "--workers", "0"]
    assert evaluate_main([*words, "--report", str(page)]) == 0
    assert Page(page).headings == [*INSTANCE_SECTIONS, "What to fix first"]
    assert evaluate_main([*words, "--report", str(page)]) == 2  # it exists
    oracle = ["quickstart", "--oracle", "--data-root", str(run[0]), "--report", str(tmp_path / "other.html")]
    assert evaluate_main(oracle) == 2 and not (tmp_path / "other.html").exists()


@pytest.mark.slow
def test_two_processes_write_the_page_of_one(panoptic_run: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["--weights", str(panoptic_run[1] / "best.pth"), "--data-root", str(panoptic_run[0]), "--device", "cpu"]
    pages = [tmp_path / "one.html", tmp_path / "two.html"]
    assert evaluate_main([*words, "--workers", "0", "--report", str(pages[0])]) == 0
    command = [sys.executable, "-m", "solov2", "eval", *words, "--workers", "0", "--nproc", "2"]
    subprocess.run([*command, "--report", str(pages[1])], check=True, timeout=300)
    parts = r'<section id="(?:figures|classes|confusion|errors|what-to-fix-first)">.*?</section>'
    one, two = (re.findall(parts, page.read_text()) for page in pages)
    assert len(one) == 5 and one == two


FAULTS = {
    "classification": "training",
    "localization": "training",
    "missed": "training",
    "duplicate": "thresholds",
    "background": "data",
    "swapped": "data",
    "shifted": "data",
    "cut": "thresholds",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_in_a_file_of_results(fault: str, tmp_path: Path) -> None:
    coco, results = scene(7, images=20)
    low = [{**entry, "score": entry["score"] - 0.45} for entry in results]
    swap = {1: 2, 2: 1, 3: 3}
    changed = {
        "swapped": [{**entry, "category_id": swap[entry["category_id"]]} for entry in low],
        "shifted": [{**entry, "segmentation": shifted(entry["segmentation"], 9)} for entry in low],
        "cut": [entry for entry in low if entry["score"] > 0.3],
    }
    planted = changed[fault] if fault in changed else plant(fault, coco, low)
    files = {"gt.json": coco.dataset, "results.json": planted}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    page = tmp_path / "page.html"
    assert evaluate_main(["--predictions", str(tmp_path / "results.json"), "--report", str(page),
                          "--val-annotations", str(tmp_path / "gt.json")]) == 0  # fmt: skip
    assert first_finding(page).startswith(FAULTS[fault])
    assert Page(page).headings == ["Figures", "Classes", "Scores", "Confusion", "Errors", "What to fix first"]


@pytest.mark.parametrize("changes", [{"annotations": []}, {}])
def test_nothing_is_right_or_nothing_is_annotated(changes: dict, tmp_path: Path) -> None:
    """No threshold is recommended then, and only with annotations is anything to fix."""
    coco, results = scene(7, images=4, crowds=False)
    (tmp_path / "gt.json").write_text(json.dumps({**coco.dataset, **changes}))
    (tmp_path / "results.json").write_text(json.dumps([{**x, "segmentation": rle(38, 38, 12, 12)} for x in results]))
    page = tmp_path / "page.html"
    assert evaluate_main(["--predictions", str(tmp_path / "results.json"), "--report", str(page),
                          "--val-annotations", str(tmp_path / "gt.json")]) == 0  # fmt: skip
    text = page.read_text()
    assert Page(page).headings[-1] == "What to fix first"
    assert "best F1" not in text and 'class="mark"' not in text and "half a point" not in text
    assert ("no losses to rank" in text) is bool(changes)
    boundary = importlib.util.find_spec("faster_coco_eval") is not None
    assert ('<th scope="col">boundary</th>' in text) is boundary


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt install chromium)")
@pytest.mark.parametrize("kind", ["run", "panoptic_run"])
def test_a_browser_shows_it(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """No error on the console, nothing refused by the policy, no request, nothing wider than a phone."""
    page = tmp_path / "page.html"
    assert report(request.getfixturevalue(kind), "--output", str(page)) == 0
    text = page.read_text()
    probe = tmp_path / "probe.html"  # the page itself has no script, so a copy measures it
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert policy in text
    measure = (
        "<script>document.title = JSON.stringify([document.documentElement.scrollWidth, window.innerWidth, "
        "performance.getEntriesByType('resource').length, [...document.images].filter(i => !i.naturalWidth).length, "
        "document.querySelectorAll('svg polyline, svg rect').length])</script></body>"
    )
    probe.write_text(text.replace(policy, f"{policy}; script-src 'unsafe-inline'").replace("</body>", measure))
    for width in (390, 1400):
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
                   f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom"]  # fmt: skip
        for path in (page, probe):
            done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=60, check=True)
            assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
        found = re.search(r"<title>(\[.*?\])</title>", done.stdout)
        assert found is not None
        wide, window, requests, broken, shapes = json.loads(found[1])
        assert wide <= window and requests == 0 and broken == 0 and shapes > 10
