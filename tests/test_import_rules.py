"""Rules that import-linter and ruff (pyproject.toml) cannot check: dependencies, fast import, devices, safe loading."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

DEPENDENCIES = {"torch", "torchvision", "pycocotools", "numpy", "PIL", "yaml", "tqdm"}
EXTRAS = {  # imported inside functions only
    "av", "cv2", "faster_coco_eval", "huggingface_hub", "onnx", "onnxruntime", "onnxscript", "openvino", "safetensors",
    "shtab", "supervision", "timm",
}  # fmt: skip
# Hard-coded devices, and loading that could run code.
FORBIDDEN = re.compile(r"\.cuda\(|[\"']cuda(:\d+)?[\"']|weights_only\s*=\s*False|torch\.load\((?!.*weights_only=True)")


def sources(repo_root: Path) -> list[Path]:
    return sorted((repo_root / "solov2").rglob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    """The first part of each imported name."""
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def runs_later(node: ast.stmt) -> bool:
    """Whether importing the module does not run this statement's body."""
    for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return for_types or isinstance(node, ast.FunctionDef | ast.ClassDef)


def test_only_the_seven_dependencies_are_imported(repo_root: Path) -> None:
    allowed = DEPENDENCIES | set(sys.stdlib_module_names) | {"solov2"}
    for path in sources(repo_root):
        tree = ast.parse(path.read_text())
        at_import = ast.Module([node for node in tree.body if not runs_later(node)], [])
        assert imported(at_import) <= allowed, path
        assert imported(tree) <= allowed | EXTRAS, path


def test_no_test_module_is_imported(repo_root: Path) -> None:
    """Shared code belongs in tests/helpers."""
    for path in sorted((repo_root / "tests").rglob("*.py")):
        assert not [name for name in imported(ast.parse(path.read_text())) if name.startswith("test_")], path


def test_no_device_is_hard_coded_and_loading_is_safe(repo_root: Path) -> None:
    found = [
        f"{path}:{number}: {line.strip()}"
        for path in sources(repo_root)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if FORBIDDEN.search(line) and not (path.name == "compute.py" and 'type == "cuda"' in line)  # asks for TF32
    ]
    assert found == []


@pytest.mark.parametrize(
    "line", ["x.cuda()", "x.to('cuda')", 'f(device="cuda:1")', "torch.load(f)", "load(f, weights_only=False)"]
)
def test_the_pattern_finds_what_it_forbids(line: str) -> None:
    assert FORBIDDEN.search(line)
    assert not FORBIDDEN.search("torch.load(file, map_location='cpu', weights_only=True)  # no cuda here")


def test_import_stays_fast(repo_root: Path) -> None:
    """`import solov2` loads no dependency; a name loads its module on first use."""
    code = (
        "import sys, solov2\n"
        f"print([name for name in {sorted(DEPENDENCIES)!r} if name in sys.modules])\n"
        "solov2.list_models()\n"
        "print('yaml' in sys.modules, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["[]", "True False"]
