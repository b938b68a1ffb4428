"""The README and docs/: every command is one that its parser takes, every link leads somewhere, the loop runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from solov2.commands.main import COMMANDS, command_module
from solov2.data.shapes import generate_shapes

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {"train.py": "train", "eval.py": "eval", "benchmark.py": "benchmark"}
OTHERS = (
    "pip",
    "pytest",
    "solov2 COMMAND",
    "python docs/generate.py",
    "python tests/",
    "solov2 --",
    "python -m solov2 C",
)


def commands_of(page: Path) -> list[str]:
    """The command lines of a page: those of its blocks, and those that stand in a sentence."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [part.strip() for line in lines for part in line.partition("  #")[0].split("&&")]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    starts = ("solov2 ", "python ", "torchrun ")
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    found += [code.replace("\\|", "|") for code in inline if code.startswith(starts)]
    return [line for line in found if line and not line.startswith("#")]


def parsed_words(line: str) -> tuple[str, list[str]] | None:
    """(command, its arguments) of a line, None where another program is meant."""
    words = shlex.split(line)
    if words[0] == "solov2" and words[1] in COMMANDS:
        return words[1], words[2:]
    script = next((number for number, word in enumerate(words) if word in SCRIPTS), None)
    if words[0] in ("python", "torchrun") and script is not None:
        return SCRIPTS[words[script]], words[script + 1 :]
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_taken_by_its_parser(page: Path) -> None:
    for line in commands_of(page):
        found = None if "…" in line else parsed_words(line)
        if found is None:
            assert "…" in line or line.startswith((*OTHERS, "torchrun --")), f"{page.name}: {line}"
            continue
        name, words = found
        command_module(name).build_parser(f"solov2 {name}").parse_args(words)


def test_there_are_commands_to_parse() -> None:
    lines = [line for page in PAGES for line in commands_of(page)]
    assert len([line for line in lines if "…" not in line and parsed_words(line)]) > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).is_file(), f"{page.name}: {target}"


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


def test_the_site_has_every_page() -> None:
    pages = re.findall(r"(\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert sorted(pages) == sorted(path.name for path in PAGES[1:])


def test_the_training_loop_of_the_docs(repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On fewer shapes than the quickstart's: it trains, and ends with the results of the first validation image."""
    [code] = re.findall(r"^```python\n(.*?)^```$", (repo_root / "docs/training_loop.md").read_text(), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    generate_shapes("data/shapes", train_images=16, val_images=2, size=192, seed=0)
    torch.manual_seed(0)
    names = {"__name__": "__main__"}
    exec(compile(code, "docs/training_loop.md", "exec"), names)

    [result] = names["results"]
    count = len(result["scores"])
    assert result["masks"].shape == (count, 192, 192) and result["masks"].dtype == torch.bool
    assert result["labels"].shape == (count,) and result["boxes"].shape == (count, 4)
    assert set(names["losses"]) == {"loss_category", "loss_mask"}
    assert all(loss.isfinite() for loss in names["losses"].values())
    steps = {state["step"].item() for state in names["optimizer"].state.values()}
    assert steps == {4}  # two epochs of two batches of eight
