"""Installation with pip: sdist -> wheel -> new environment, and an editable checkout. Nothing is downloaded."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import solov2

BUILD = "import sys, setuptools.build_meta as backend; print(getattr(backend, sys.argv[1])(sys.argv[2]))"
USE = """
import numpy
import solov2
from solov2.config import config_folder

[result] = solov2.build_model("quickstart").predict(numpy.zeros((48, 64, 3), dtype=numpy.uint8))
print(solov2.__file__, config_folder(), *result["masks"].shape[1:], sep="\\n")
"""
# mypy must report each mistake that is ignored here: an unused ignore comment is an error too.
CONSUMER = """
import numpy as np
from torch import Tensor

import solov2
from solov2 import SOLOv2, build_model


def scores(image: np.ndarray, device: str | None) -> Tensor:
    model: SOLOv2 = build_model("quickstart", device=device)
    names: list[str] = model.class_names[: model.num_classes]
    result = model.predict([image, "photo.jpg"], mask_format="rle")[0]
    solov2.draw_instances(image, result, names).save("picture.png")
    kept: Tensor = solov2.ops.matrix_nms.matrix_nms(result["masks"], result["labels"], result["scores"])
    return kept


assigner = solov2.targets.TargetAssigner([8, 6, 5, 4, 3], [(1, 96)] * 5, num_classes=80)
best: float = solov2.train("quickstart", epochs=1).metrics["segm_AP"]
count: int = solov2.build_model("quickstart")  # type: ignore[assignment]
solov2.build_model("quickstart", weights=3)  # type: ignore[arg-type]
solov2.ops.matrix_nms.matrix_nms(1)  # type: ignore[call-arg, arg-type]
solov2.no_such_name  # type: ignore[attr-defined]
"""


def start(*arguments: str, cwd: Path, interpreter: str = sys.executable, path: Path | None = None) -> subprocess.Popen:
    """Start Python with pip offline; PYTHONPATH is `path`, or unset."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1"}
    environment |= {} if path is None else {"PYTHONPATH": str(path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([interpreter, *arguments], cwd=cwd, text=True, env=environment, **pipes)


def finish(process: subprocess.Popen) -> str:
    """Wait for a process to succeed; returns its standard output."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    return output


def python(*arguments: str, cwd: Path, interpreter: str = sys.executable) -> str:
    return finish(start(*arguments, cwd=cwd, interpreter=interpreter))


@pytest.fixture(scope="session")
def checkout(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository in a folder named like a clone, so that building does not touch the original."""
    pytest.importorskip("setuptools", reason="building needs setuptools: pip install -e '.[test]'")
    pytest.importorskip("pip", reason="installing needs pip")
    copy = tmp_path_factory.mktemp("folder of clones") / "solov2"
    for folder in ("solov2", "configs", "docs", "examples", "tests"):
        shutil.copytree(repo_root / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for path in repo_root.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, copy)
    return copy


@pytest.fixture(scope="session")
def unpacked_sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    name = python("-c", BUILD, "build_sdist", str(folder), cwd=checkout).split()[-1]
    with tarfile.open(folder / name) as archive:
        archive.extractall(folder, filter="data")
    return folder / name.removesuffix(".tar.gz")


@pytest.fixture(scope="session")
def wheel(unpacked_sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the unpacked sdist, which shows that both are complete."""
    folder = tmp_path_factory.mktemp("wheel")
    python(
        "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), ".", cwd=unpacked_sdist
    )
    [path] = folder.glob("solov2-*.whl")
    return path


class Installed(NamedTuple):
    """An interpreter that has the library, and the folder that the package should be found in."""

    python: str
    package: Path
    path: Path | None = None


def new_environment(folder: Path) -> str:
    """Create an environment with the packages of this one, except editable ones; returns its interpreter."""
    python("-m", "venv", "--without-pip", str(folder), cwd=folder.parent)
    [site_packages] = folder.rglob("site-packages")
    outer = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site_packages / "outer.pth").write_text("\n".join(outer))  # .pth files in those folders are not read
    return str(folder / "bin" / "python")


@pytest.fixture(scope="session", params=["clone", "wheel", "editable"])
def installed(request: pytest.FixtureRequest, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp(request.param)
    interpreter = new_environment(folder / "environment")
    if request.param == "clone":
        return Installed(interpreter, checkout, path=checkout)
    what = ["-e", str(checkout)] if request.param == "editable" else [str(request.getfixturevalue("wheel"))]
    options = ["--no-deps", "--no-build-isolation", "--ignore-installed"]
    python("-m", "pip", "install", *options, *what, cwd=folder, interpreter=interpreter)
    [site_packages] = folder.rglob("site-packages")
    return Installed(interpreter, checkout if request.param == "editable" else site_packages)


def configurations(root: Path) -> set[str]:
    return {path.relative_to(root / "configs").as_posix() for path in (root / "configs").rglob("*.yaml")}


def test_sdist_is_complete(checkout: Path, unpacked_sdist: Path) -> None:
    names = {path.relative_to(unpacked_sdist).as_posix() for path in unpacked_sdist.rglob("*") if path.is_file()}
    wanted = {
        path.relative_to(checkout).as_posix()
        for folder in ("solov2", "configs", "docs", "examples", "tests")
        for path in (checkout / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".md", ".typed")
    }
    wanted |= {"LICENSE", "README.md", "pyproject.toml", "setup.py", "train.py", "eval.py", "benchmark.py"}
    assert wanted <= names


def test_wheel_holds_code_configurations_and_license(checkout: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = {path.relative_to(checkout).as_posix() for path in (checkout / "solov2").rglob("*.py")}
    wanted |= {"solov2/py.typed"} | {f"solov2/configs/{name}" for name in configurations(checkout)}
    assert len(configurations(checkout)) >= 10
    packaged = {name for name in names if not name.startswith("solov2-")}
    assert packaged == wanted
    assert any(name.endswith("/LICENSE") for name in names)


def test_checkout_and_sdist_give_the_same_wheel(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    python("-c", BUILD, "build_wheel", str(tmp_path), cwd=checkout)
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(tmp_path / wheel.name) as other:
        assert {info.filename: info.CRC for info in one.infolist()} == {
            info.filename: info.CRC for info in other.infolist()
        }


def test_entry_points_and_requirements(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [entry_points] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        parser = configparser.ConfigParser()
        parser.read_string(archive.read(entry_points).decode())
        [metadata] = [archive.read(name).decode() for name in archive.namelist() if name.endswith("METADATA")]
        modules = set(archive.namelist())
    scripts = dict(parser["console_scripts"])
    assert set(scripts) == {
        "solov2", "solov2-train", "solov2-eval", "solov2-benchmark", "solov2-predict", "solov2-export",
        "solov2-check-data",
    }  # fmt: skip
    for target in scripts.values():
        module, function = target.split(":")
        assert function == "main" and module.replace(".", "/") + ".py" in modules
    required = set(re.findall(r"^Requires-Dist: ([A-Za-z]+)[^;\n]*$", metadata, re.MULTILINE))
    assert required == {"torch", "torchvision", "pycocotools", "numpy", "pillow", "pyyaml", "tqdm"}
    extras = set(re.findall(r"^Provides-Extra: (\S+)$", metadata, re.MULTILINE))
    wanted = {
        "test",
        "dev",
        "docs",
        "fast",
        "tensorboard",
        "export",
        "completion",
        "timm",
        "hub",
        "video",
        "report",
        "all",
    }
    assert extras == wanted
    assert re.search(r"^Version: (\S+)$", metadata, re.MULTILINE)[1] == solov2.__version__


def test_imports_builds_and_predicts(installed: Installed, checkout: Path, tmp_path: Path) -> None:
    """Inside the clone, the package of the current folder takes precedence over an installed one, as always in Python.

    In the folder above, the clone is a folder `solov2` without code, which must not hide the package. Without
    an installation, PYTHONPATH is the clone.
    """
    places = {"inside": checkout, "beside": checkout.parent, "outside": tmp_path}
    running = {
        place: start(
            "-c", USE, cwd=cwd, interpreter=installed.python, path=None if place == "inside" else installed.path
        )
        for place, cwd in places.items()
    }
    for place, process in running.items():
        module, configs, *size = finish(process).splitlines()
        root = checkout if place == "inside" else installed.package
        assert Path(module) == root / "solov2" / "__init__.py", place
        assert Path(configs) == (root if root == checkout else root / "solov2") / "configs", place
        assert size == ["48", "64"], place


@pytest.mark.parametrize("installed", ["editable"], indirect=True)
def test_an_editable_install_is_a_path_entry(installed: Installed, checkout: Path) -> None:
    """Python would consult a finder only after taking a folder `solov2` for the package."""
    [site_packages] = Path(installed.python).parents[1].rglob("site-packages")
    entries = {path.name: path for path in site_packages.iterdir() if "editable" in path.name}
    assert list(entries) == [f"__editable__.solov2-{solov2.__version__}.pth"]
    assert [path.read_text().strip() for path in entries.values()] == [str(checkout)]


@pytest.mark.parametrize("installed", ["wheel", "editable"], indirect=True)
def test_a_type_checker_sees_the_types(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("mypy", reason="needs mypy: pip install -e '.[dev]'")
    folder = tmp_path_factory.getbasetemp() / "consumer"  # shared, so that mypy reads torch only once
    folder.mkdir(exist_ok=True)
    (folder / "consumer.py").write_text(CONSUMER)
    checked = python("-m", "mypy", "--strict", "consumer.py", cwd=folder, interpreter=installed.python)
    assert checked.startswith("Success: no issues found in 1 source file")


def test_readme_has_the_test_command_that_ci_runs(repo_root: Path) -> None:
    """.ci/run runs the line between these two comments, which must be the command that users are told to type."""
    readme = (repo_root / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- test command -->\n(.*?)<!-- end of test command -->", readme, re.DOTALL)
    lines = [line for line in block[1].splitlines() if line.strip() and not line.startswith("```")]
    assert lines == ["pip install -e '.[test]' && pytest"]
    assert os.access(repo_root / ".ci" / "run", os.X_OK)
