"""The README and docs/: every command is one that its parser takes, every link leads somewhere, the loop runs."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import solov2
from solov2.checkpoint import Checkpoint, write_file
from solov2.commands.main import COMMANDS, command_module
from solov2.config import load_config, override_config
from solov2.convert import to_mmdet
from solov2.data.panoptic_shapes import generate_panoptic_shapes
from solov2.data.shapes import generate_shapes
from solov2.formats import labelme
from solov2.formats.recognize import read
from solov2.weights import weight_metadata

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {"train.py": "train", "eval.py": "eval", "benchmark.py": "benchmark"}
OTHERS = (
    "pip",
    "pytest",
    "solov2 COMMAND",
    "python docs/generate.py",
    "python tests/",
    "python examples/",
    "docker ",
    "curl ",
    "MODEL=mine.onnx uvicorn",
    "python -m venv",
    "source ",
    "mkdir ",
    "cd ",
    "unzip ",
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


TINY = "--set model.input_scale=[192,128]"
FEW = f"--epochs 1 --batch-size 2 --set data.train_scales=[128] --set data.train_long_edge=192 {TINY}"
CPU = "--device cpu --overwrite"
HERE = f"{CPU} --workers 0"
TIMED = "--device cpu --size 64 96 --iterations 1"
MINE = "--val-annotations mine/val.json --val-images mine/images"
WEIGHTS = {
    "solov2_r50_fpn_3x": "r50.pth",
    "solov2_light_r50_fpn_3x": "light.pth",
    "solov2_light_r18_fpn_3x": "r18.pth",
}
FIRST_HOUR = "solov2 train quickstart --data photos --set data.shapes=false"
# Words that let a documented command end within seconds, on the files of `prepare_files`.
RUNS = {
    "python train.py configs/quickstart.yaml": f"{HERE} --epochs 1 --set data.shapes_train=16",
    "solov2 predict street.jpg folder/ --weights FILE --results results.json": CPU,
    "solov2 predict folder/ --weights FILE --output found --format pictures,yolo,coco": CPU,
    "solov2 predict folder/ --weights FILE --output found --nproc 2 --continue": CPU,
    "solov2 predict street.jpg --weights FILE --tile 1000": CPU,
    "python eval.py --weights runs/quickstart/best.pth --tta flip": HERE,
    "solov2 report runs/quickstart": HERE,
    "solov2 report runs/before runs/after": HERE,
    "solov2 check-data mine/train.json --images mine/images": "",
    "solov2 check-data data/panoptic/annotations/panoptic_val2017.json --images data/panoptic/val2017": "",
    "solov2 panoptic-quality data/panoptic/annotations/panoptic_val2017.json found/panoptic.json --json pq.json": "",
    "python eval.py configs/solov2_r50_fpn_3x.yaml --weights FILE": f"{HERE} --data-root data/coco {TINY}",
    "solov2 export solov2_light_r50_fpn_3x --weights FILE --size 448 768 --output light.onnx": "--overwrite",
    "solov2 export solov2_light_r50_fpn_3x --weights FILE --size 448 768 --output light.pt2": "--overwrite",
    "solov2 export --weights runs/mine/best.pth --size 448 768 --output mine.onnx": "--overwrite",
    "solov2 export --weights runs/mine/best.pth --size 448 768 --output half.onnx --precision fp16": "--overwrite",
    "solov2 export --weights runs/mine/best.pth --size 448 768 --output half.pt2 --precision bf16": "--overwrite",
    "solov2 export --weights runs/mine/best.pth --size 448 768 --output int8.onnx --precision int8 "
    "--calibrate mine/images": "--overwrite",
    "solov2 export --weights runs/mine/best.pth --size 448 768 --output mine.onnx --check mine/images": "--overwrite",
    "solov2 models": "",
    "solov2 import mine/labelme --output mine/all.json --val-split 0.2": "--overwrite",
    'solov2 train solov2_r50_fpn_1x --set train.epochs=6 --set "data.train_scales=[640]"': "--dry-run",
    "solov2 train solov2_light_r18_fpn_3x --data mine/labelme": "--dry-run --device cpu",
    "solov2 train mine.yaml": f"{HERE} --output runs/yaml {FEW}",
    "python eval.py --weights runs/quickstart/best.pth --results results.json": HERE,
    "python eval.py --weights runs/quickstart/best.pth --per-class --boundary": HERE,
    "python eval.py --predictions results.json --data-root data/shapes": "",
    "python benchmark.py --json now.json": TIMED,
    "python benchmark.py solov2_r101_fpn_3x --mode infer": TIMED,
    "python benchmark.py --mode data --data-root data/coco": "--device cpu --iterations 1",
    "python benchmark.py --json then.json --compare now.json": TIMED,
    "python benchmark.py --mode train --sweep batch-size 1 2 4 8": TIMED,
    "python eval.py --weights FILE --precision bf16": f"{HERE} --data-root data/coco {TINY}",
    "python train.py solov2_r50_fpn_3x --dry-run": "",
    "python train.py --resume --output DIR": "--device cpu --workers 0",
    "solov2 weights list": "",
    "solov2 weights verify FILE": "",
    "solov2 convert SOLOv2_R50_3x.pth ours.pth": "--overwrite",
    "solov2 convert SOLOv2_R50_3x.pth ours.safetensors": "--overwrite",
    "solov2 convert runs/mine/best.pth theirs.pth --to mmdet": "--overwrite",
    "python train.py solov2_light_r18_fpn_3x --weights FILE --train-annotations mine/train.json "
    f"--train-images mine/images {MINE}": f"{HERE} {FEW}",
    "solov2 check-data mine/train.json --images mine/images --config solov2_light_r18_fpn_3x": "",
    f"python eval.py solov2_light_r18_fpn_3x --oracle {MINE}": "--device cpu --workers 0",
    "solov2 check-data mine/train.json --images mine/images --json report.json --fix mine/repaired.json": "--overwrite",
    "python train.py quickstart_panoptic": f"{HERE} --epochs 1 --set data.shapes_train=16 --set data.shapes_val=2",
    "python eval.py quickstart_panoptic --oracle": f"{HERE} --set data.shapes=false",  # the run above made fewer
    "python eval.py --weights runs/quickstart_panoptic/best.pth --per-class": HERE,
    "solov2 predict data/panoptic_shapes/val2017 --weights runs/quickstart_panoptic/best.pth --panoptic "
    "--output found": CPU,
    "solov2 check-data data/coco/annotations/instances_val2017.json --images data/coco/val2017": "",
    "python train.py solov2_r50_fpn_1x --accumulate 8 --dry-run": "--accumulate 2",  # of eight images
    "python benchmark.py --mode train": TIMED,
    "python benchmark.py solov2_r50_fpn_1x --mode train --batch-size 2": TIMED,
    # docs/first_hour.md, from its first step to its last
    "python examples/sample_photos.py photos new_photos": "--count 20 --size 96",
    "solov2 import photos --output data/photos.json --val-split 0.2": "",
    "solov2 check-data data/photos_train.json --images photos --config quickstart": "",
    f"{FIRST_HOUR} --epochs 30 --output runs/photos --dry-run --pictures samples.png": "--device cpu",
    f"{FIRST_HOUR} --epochs 30 --output runs/photos": f"{HERE} --epochs 1",
    "solov2 train --resume --output runs/photos": "--device cpu --workers 0",
    "solov2 report runs/photos": CPU,
    "solov2 predict new_photos --weights runs/photos/best.pth --output found --format pictures,labelme": CPU,
    "solov2 export --weights runs/photos/best.pth --size 192 192 --output mine.onnx --check new_photos": "--overwrite",
    "python examples/onnxruntime_predict.py mine.onnx new_photos/IMG_0001.jpg": "",
    "solov2 eval quickstart --oracle --val-annotations data/photos_val.json --val-images photos": HERE,
    f"{FIRST_HOUR} --dry-run --pictures augmented.png --set data.copy_paste=0.5 "
    '--set "data.scale_jitter=[0.6,1.4]" --set "data.color_jitter=[0.4,0.4,0.4,0.1]"': "--device cpu",
}
# Why the others do not run here, by how they begin.
NOT_RUN = {
    "pip install": "changes the environment; .ci/run types both commands of the README in fresh ones",
    "python -m venv": "the same",
    "source .venv": "the same",
    "pip download": "downloads",
    "unzip ": "what was downloaded",
    "mkdir -p data/coco": "for a download",
    "cd ": "the same",
    "curl -O": "downloads",
    "python eval.py solov2_r50_fpn_3x --weights official": "downloads",
    "solov2 train solov2_light_r18_fpn_3x --data photos --weights official": "downloads",
    "pytest": "runs this test",
    "torchrun --nproc-per-node 8": "eight processes; two run in test_distributed.py",
    "torchrun -- train.py --nproc 8": "eight processes; two run in test_distributed.py",
    "torchrun train.py --nproc 8": "documented as refused by torchrun",
    "torchrun --max-restarts": "part of a command; restart.py runs it whole",
    "python train.py --nproc 8": "eight processes; two run in test_distributed.py",
    "python train.py solov2_r50_fpn_1x --nproc 8": "the same",
    "python eval.py solov2_r50_fpn_1x": "the same",
    "torchrun --nnodes 2": "two machines; tests/scripts/two_hosts.py has two network namespaces",
    "python train.py solov2_r50_fpn_1x --accumulate 8": "R50 at the full size; its plan is printed above",
    "python train.py solov2_r50_fpn_1x --batch-size 16": "the same",
    "python train.py solov2_light_r18_fpn_3x --weights official": "downloads",
    "solov2 weights fetch": "downloads",
    "python train.py configs/quickstart.yaml --seed 0": "minutes; runs in short form above",
    "python train.py solov2_panoptic_r50_fpn_3x": "R50 at the full size; the tiny one runs in test_panoptic_runs.py",
    "python eval.py solov2_panoptic_r50_fpn_3x": "the same",
    "solov2 panoptic-quality GT.json results/panoptic.json": "the same as another, with the names of files",
    "python examples/panoptic_sweep.py": "test_panoptic_runs.py runs it",
    "python examples/coins.py": "minutes, and a photograph; test_example_data.py runs it in short form",
    "python examples/onnxruntime_predict.py mine.onnx street.jpg": "test_examples.py runs it",
    "python examples/openvino_predict.py": "the same",
    "MODEL=mine.onnx uvicorn": "does not end; test_examples.py starts it",
    "docker ": "needs Docker",
    "curl --data-binary": "needs a server; test_examples.py asks it",
    "python tests/scripts/": "minutes to hours, on its own",
    "python tests/peer/": "needs mmdetection in an environment of its own",
}


def documented_lines() -> set[str]:
    """Every command of the pages; those of commands.md are the usage texts that the parsers themselves print."""
    pages = [page for page in PAGES if page.name not in ("commands.md", "changelog.md")]
    return {" ".join(line.split()) for page in pages for line in commands_of(page) if "…" not in line}


def test_every_command_runs_or_has_a_reason() -> None:
    lines = documented_lines()
    unknown = [line for line in lines if line not in RUNS and not line.startswith(tuple(NOT_RUN))]
    assert not unknown and set(RUNS) <= lines, (unknown, set(RUNS) - lines)
    assert all(any(line.startswith(start) for line in lines) for start in NOT_RUN)


@pytest.mark.slow
def test_documented_commands_run(repo_root: Path, tmp_path: Path) -> None:
    """All of `RUNS`, in the order of the pages, in a folder with the files that they name."""
    prepare_files(tmp_path)
    failed = []
    for line, more in RUNS.items():
        if ".onnx" in line and importlib.util.find_spec("onnx") is None:
            continue
        command = [sys.executable, *arguments_of(line), *shlex.split(more)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        if done.returncode:
            failed.append(f"{' '.join(command[1:])}: {done.returncode}\n{done.stderr[-600:]}")
    assert not failed, "\n\n".join(failed)


def arguments_of(line: str) -> list[str]:
    """What Python gets for a documented line: a script of examples/, or the library with the files that exist here."""
    parsed = parsed_words(line)
    if parsed is None:
        _, script, *words = shlex.split(line)
        return [str(ROOT / script), *words]
    weights = next((file for model, file in WEIGHTS.items() if model in line), "tiny.pth")
    words = [{"FILE": weights, "DIR": "runs/quickstart"}.get(word, word) for word in parsed[1]]
    return ["-m", "solov2", parsed[0], *words]


def prepare_files(folder: Path) -> None:
    """Data, images and weights under the names that the pages use."""
    generate_shapes(folder / "data/coco", train_images=8, val_images=2, size=96, seed=0)
    generate_panoptic_shapes(folder / "data/panoptic", train_images=2, val_images=2, size=96, seed=0)
    panoptic = folder / "data/panoptic/annotations/panoptic_val2017"
    shutil.copytree(panoptic, folder / "found/panoptic")
    shutil.copy(panoptic.with_suffix(".json"), folder / "found/panoptic.json")
    mine, coco = folder / "mine", folder / "data/coco"
    shutil.copytree(coco / "train2017", mine / "images")
    shutil.copy(coco / "annotations/instances_train2017.json", mine / "train.json")
    shutil.copy(coco / "annotations/instances_train2017.json", mine / "val.json")
    photos = sorted((mine / "images").iterdir())
    reading = read(mine / "train.json", mine / "images")
    labelme.write(reading.images, reading.root, mine / "labelme")
    for photo in photos:
        shutil.copy(photo, mine / "labelme")
    shutil.copytree(coco / "val2017", folder / "folder")
    shutil.copy(photos[0], folder / "street.jpg")
    (folder / "mine.yaml").write_text("base: quickstart\ndata: {root: data/coco, shapes: false}\n")
    names = json.loads((mine / "train.json").read_text())["categories"]
    for name, path in {**WEIGHTS, "quickstart": "tiny.pth", "solov2_light_r18_fpn_3x": "runs/mine/best.pth"}.items():
        overrides = {"model.num_classes": 4, "data.root": "data/coco", "data.shapes": False}
        config = override_config(load_config(name), overrides)
        model = solov2.build_model(config)
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Checkpoint(
            source=path,
            weights=model.state_dict(),
            traits=weight_metadata(config.model),
            class_names=[category["name"] for category in names],
            category_ids=[category["id"] for category in names],
            config=config.to_dict(),
        ).save(folder / path)
    shutil.copy(folder / "runs/mine/best.pth", folder / WEIGHTS["solov2_light_r18_fpn_3x"])
    for run in ("before", "after"):
        (folder / "runs" / run).mkdir()
        shutil.copy(folder / "tiny.pth", folder / "runs" / run / "best.pth")
    write_file(folder / "SOLOv2_R50_3x.pth", to_mmdet(solov2.build_model("solov2_r50_fpn_3x").state_dict()))
