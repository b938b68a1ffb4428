"""What pip installs: sdist -> wheel -> a folder elsewhere, and an editable checkout. Nothing is downloaded."""

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

import pytest

import solov2

BUILD = "import sys, setuptools.build_meta as backend; print(getattr(backend, sys.argv[1])(sys.argv[2]))"
# The checkout under test may be installed in editable mode itself; its finder must not answer for the copy's.
USE = (
    "import sys, site; sys.meta_path[:] = [item for item in sys.meta_path if 'ditable' not in repr(item)]\n"
    "for name in [name for name in sys.modules if 'editable' in name]: del sys.modules[name]\n"
    "sys.path.insert(0, sys.argv[1]); site.addsitedir(sys.argv[1])\n"
    "import solov2; from solov2.config import config_folder\n"
    "print(solov2.__file__); print(config_folder()); print(*solov2.list_models())\n"
    "if len(sys.argv) > 2: print(sum(p.numel() for p in solov2.build_model(sys.argv[2]).parameters()))"
)


def python(*arguments: str, cwd: Path) -> str:
    """Standard output of a Python process that sees neither the checkout nor the network."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**environment, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="session")
def checkout(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git would hand out, so that building leaves nothing behind in the real one."""
    pytest.importorskip("setuptools", reason="building needs setuptools: pip install -e '.[test]'")
    pytest.importorskip("pip", reason="installing needs pip")
    copy = tmp_path_factory.mktemp("checkout")
    for folder in ("solov2", "configs", "tests"):
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
    """The wheel, built from the unpacked sdist: that shows both are complete."""
    folder = tmp_path_factory.mktemp("wheel")
    python(
        "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), ".", cwd=unpacked_sdist
    )
    [path] = folder.glob("solov2-*.whl")
    return path


def configurations(root: Path) -> set[str]:
    return {path.relative_to(root / "configs").as_posix() for path in (root / "configs").rglob("*.yaml")}


def test_sdist_is_complete(checkout: Path, unpacked_sdist: Path) -> None:
    names = {path.relative_to(unpacked_sdist).as_posix() for path in unpacked_sdist.rglob("*") if path.is_file()}
    wanted = {
        path.relative_to(checkout).as_posix()
        for folder in ("solov2", "configs", "tests")
        for path in (checkout / folder).rglob("*")
        if path.suffix in (".py", ".yaml")
    }
    wanted |= {"LICENSE", "README.md", "pyproject.toml", "setup.py", "train.py", "eval.py", "benchmark.py"}
    assert wanted <= names


def test_wheel_holds_code_configurations_and_license(checkout: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = {path.relative_to(checkout).as_posix() for path in (checkout / "solov2").rglob("*.py")}
    wanted |= {f"solov2/configs/{name}" for name in configurations(checkout)}
    assert len(configurations(checkout)) >= 10
    packaged = {name for name in names if not name.startswith("solov2-")}
    assert packaged == wanted
    assert any(name.endswith("/LICENSE") for name in names)


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
    assert set(re.findall(r"^Provides-Extra: (\S+)$", metadata, re.MULTILINE)) >= {"test", "dev", "fast", "tensorboard"}
    assert re.search(r"^Version: (\S+)$", metadata, re.MULTILINE)[1] == solov2.__version__


def test_installed_wheel_builds_a_model(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    python("-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel), cwd=tmp_path)
    module, folder, models, parameters = python(
        "-c", USE, str(target), "solov2_light_r18_fpn_3x", cwd=tmp_path
    ).splitlines()
    assert Path(module) == target / "solov2" / "__init__.py" and Path(folder) == target / "solov2" / "configs"
    assert models.split() == solov2.list_models()
    assert int(parameters) == 18_271_760


def test_editable_install_finds_the_configurations_beside_it(checkout: Path, tmp_path: Path) -> None:
    python(
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--ignore-installed",  # else pip uninstalls the library from this very environment
        "--prefix",
        str(tmp_path / "prefix"),
        "-e",
        ".",
        cwd=checkout,
    )
    [site_packages] = (tmp_path / "prefix").rglob("site-packages")
    module, folder, models = python("-c", USE, str(site_packages), cwd=tmp_path).splitlines()
    assert Path(module) == checkout / "solov2" / "__init__.py" and Path(folder) == checkout / "configs"
    assert models.split() == solov2.list_models()


def test_readme_has_the_one_test_command_that_ci_types(repo_root: Path) -> None:
    """.ci/run takes the line between these two comments; it must be the command users are told to type."""
    readme = (repo_root / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- test command -->\n(.*?)<!-- end of test command -->", readme, re.DOTALL)
    lines = [line for line in block[1].splitlines() if line.strip() and not line.startswith("```")]
    assert lines == ["pip install -e '.[test]' && pytest"]
    assert os.access(repo_root / ".ci" / "run", os.X_OK)
