"""The table of floors: which module may import which, and what no module may do at all.

Read from the syntax tree, so imports inside functions and under TYPE_CHECKING count like all others.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

# Part of the package (module or subpackage) -> the parts it may import. Modules of one part may import each other.
FLOOR_0 = {"config", "distributed", "ops", "outputs"}
FLOOR_1 = {"data", "models"}
FLOOR_2 = {"targets", "losses"}
FLOOR_3 = {"evaluation", "optim", "logger", "checkpoint"}
FLOOR_4 = {"guard", "engine", "convert"}
ERRORS = {"errors"}  # how a command ends: for everything that has a `main`
BELOW_EDGES = ERRORS | FLOOR_0 | FLOOR_1 | FLOOR_2 | FLOOR_3 | FLOOR_4 | {"build"}
EDGES = {"visualize", "predict", "export", "check_data"}
TOP = {"", "commands"}  # "" is solov2/__init__.py
MAY_IMPORT = {
    "config": set(),
    "distributed": {"config"},
    "ops": {"config"},
    "outputs": {"config"},
    "data": FLOOR_0,
    "models": {"ops"},
    **dict.fromkeys(FLOOR_2 | FLOOR_3, FLOOR_0),
    "guard": FLOOR_0 | {"checkpoint"},
    "engine": FLOOR_0 | {"logger", "guard"},  # everything else arrives as an argument
    "errors": {"config", "distributed"},
    "convert": FLOOR_0 | {"checkpoint"} | ERRORS,
    "build": BELOW_EDGES - {"build"} - ERRORS,
    "visualize": BELOW_EDGES,
    **dict.fromkeys(EDGES - {"visualize"}, BELOW_EDGES | {"visualize"}),
    **dict.fromkeys(TOP, BELOW_EDGES | EDGES | TOP),
}
# Floor 0 is flat but for the one exception class that every module may raise.
ONLY_NAMES = {(part, "config"): {"InputError"} for part in ("ops", "distributed", "outputs")}
OUTSIDE = {"torch", "torchvision", "pycocotools", "numpy", "PIL", "yaml", "tqdm"}
# Extras: imported inside functions only.
OPTIONAL = {"faster_coco_eval", "onnxscript", "tensorboard", "torch.utils.tensorboard"}
MIN_HINTED = 0.95


@dataclass
class Import:
    """One imported name: `module` and, in `from module import name`, the name."""

    module: str
    name: str | None
    line: int
    lazy: bool


@dataclass
class Source:
    """A parsed module of the package."""

    path: Path
    name: str  # dotted, e.g. solov2.ops.masks
    tree: ast.Module = field(repr=False)

    @property
    def part(self) -> str:
        return part_of(self.name)


def part_of(module: str) -> str:
    """solov2.ops.masks -> ops; solov2 -> ''."""
    return module.split(".")[1] if "." in module else ""


def read_package(package: Path) -> list[Source]:
    sources = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources.append(Source(path, name, ast.parse(path.read_text(encoding="utf-8"))))
    return sources


def imports_of(source: Source) -> list[Import]:
    found = []
    in_functions = {id(inner) for function in functions_of(source.tree) for inner in ast.walk(function)}
    for node in ast.walk(source.tree):
        line, lazy = getattr(node, "lineno", 0), id(node) in in_functions
        if isinstance(node, ast.Import):
            found += [Import(alias.name, None, line, lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = source.name.split(".") if source.path.name == "__init__.py" else source.name.split(".")[:-1]
                module = ".".join([*package[: len(package) - node.level + 1], *([module] if module else [])])
            found += [Import(module, alias.name, line, lazy) for alias in node.names]
        elif isinstance(node, ast.Call) and called_name(node).endswith(("import_module", "__import__")) and node.args:
            target = node.args[0]
            known = isinstance(target, ast.Constant) and isinstance(target.value, str)
            found.append(Import(target.value if known else "<computed>", None, line, lazy))
    return found


def called_name(node: ast.Call) -> str:
    return ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""


def target_module(item: Import, modules: set[str]) -> str:
    """The module that an import of the package's own loads: `from solov2.ops import masks` loads solov2.ops.masks."""
    return full if item.name and (full := f"{item.module}.{item.name}") in modules else item.module


def import_violations(sources: list[Source]) -> list[str]:
    modules = {source.name for source in sources}
    problems = []
    for source in sources:
        if source.part not in MAY_IMPORT:
            problems.append(f"{source.name}: is not in the table of floors")
            continue
        for item in imports_of(source):
            where = f"{source.name}:{item.line}"
            if item.module.split(".")[0] == "solov2":
                problems += own_import_violations(source, target_module(item, modules), item, modules, where)
            elif item.module == "<computed>":
                if source.part not in TOP:
                    problems.append(f"{where}: imports a computed module name")
            else:
                problems += outside_import_violations(item, where)
    return problems


def own_import_violations(source: Source, target: str, item: Import, modules: set[str], where: str) -> list[str]:
    part, target_part = source.part, part_of(target)
    if target not in modules:
        return [f"{where}: {target} does not exist"]
    if target_part == part:
        return []
    if target_part not in MAY_IMPORT[part]:
        return [f"{where}: {part or '__init__'} must not import {target}"]
    allowed = ONLY_NAMES.get((part, target_part))
    if allowed is not None and item.name not in allowed:
        return [f"{where}: {part} may import only {', '.join(allowed)} from {target_part}"]
    return []


def outside_import_violations(item: Import, where: str) -> list[str]:
    full = f"{item.module}.{item.name}"
    if any(name in OPTIONAL or name.split(".")[0] in OPTIONAL for name in (item.module, full)):
        return [] if item.lazy else [f"{where}: {item.module} is optional and must be imported inside a function"]
    if item.module.split(".")[0] not in OUTSIDE | set(sys.stdlib_module_names):
        return [f"{where}: {item.module} is not among the dependencies"]
    return []


def import_cycle(sources: list[Source]) -> list[str]:
    modules = {source.name for source in sources}
    graph = {
        source.name: {target_module(item, modules) for item in imports_of(source)} & modules - {source.name}
        for source in sources
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def forbidden_code(source: Source) -> list[str]:
    """Device literals, unsafe loading, shells."""
    problems = []
    for node in ast.walk(source.tree):
        where = f"{source.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"cuda(:\d+)?", node.value):
            problems.append(f"{where}: device literal {node.value!r}; take the device from an argument")
        if not isinstance(node, ast.Call):
            continue
        called = called_name(node)
        keywords = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            problems.append(f"{where}: .cuda(); use .to(device)")
        if called == "torch.load" and keywords.get("weights_only") is not True:
            problems.append(f"{where}: torch.load without weights_only=True")
        if keywords.get("weights_only", True) is False:
            problems.append(f"{where}: weights_only=False")
        if called.startswith("yaml.") and "load" in called and called != "yaml.safe_load":
            problems.append(f"{where}: {called}; only yaml.safe_load")
        if called in ("eval", "exec", "os.system", "pickle.load", "pickle.loads") or keywords.get("shell") is True:
            problems.append(f"{where}: {called} runs what it is given")
    return problems


def functions_of(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def unhinted_arguments(source: Source) -> tuple[list[str], int]:
    """Arguments without a type hint, and the number of all arguments; `self` and `cls` do not count."""
    missing, total = [], 0
    for function in functions_of(source.tree):
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args]
        if named and named[0].arg in ("self", "cls"):
            named = named[1:]
        extra = [item for item in (arguments.vararg, arguments.kwarg) if item is not None]
        for item in (*named, *arguments.kwonlyargs, *extra):
            total += 1
            if item.annotation is None:
                missing.append(f"{source.name}:{function.lineno} {function.name}({item.arg})")
    return missing, total


def missing_docstrings(source: Source) -> list[str]:
    """The module, its public functions and classes, and the public methods of those."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [node for node in source.tree.body if isinstance(node, definitions) and not node.name.startswith("_")]
    methods = [
        item
        for node in public
        if isinstance(node, ast.ClassDef)
        for item in node.body
        if isinstance(item, definitions) and not item.name.startswith("_")
    ]
    problems = [] if ast.get_docstring(source.tree) else [f"{source.name}: no module docstring"]
    return problems + [
        f"{source.name}:{node.lineno} {node.name}: no docstring"
        for node in (*public, *methods)
        if not ast.get_docstring(node)
    ]


@pytest.fixture(scope="module")
def sources(repo_root: Path) -> list[Source]:
    return read_package(repo_root / "solov2")


def test_imports_follow_the_floors(sources: list[Source]) -> None:
    assert len(sources) > 5
    assert import_violations(sources) == []


def test_there_is_no_import_cycle(sources: list[Source]) -> None:
    assert import_cycle(sources) == []


def test_no_forbidden_code(sources: list[Source]) -> None:
    assert [problem for source in sources for problem in forbidden_code(source)] == []


def test_arguments_have_type_hints(sources: list[Source]) -> None:
    results = [unhinted_arguments(source) for source in sources]
    missing, total = [name for names, _ in results for name in names], sum(count for _, count in results)
    assert total > 50 and len(missing) <= (1 - MIN_HINTED) * total, missing


def test_public_names_have_docstrings(sources: list[Source]) -> None:
    assert [problem for source in sources for problem in missing_docstrings(source)] == []


def test_import_stays_cheap(repo_root: Path) -> None:
    """`import solov2` loads no dependency; a name loads its module when it is first used."""
    code = (
        "import sys, solov2\n"
        f"loaded = {sorted(OUTSIDE)!r}\n"
        "print([name for name in loaded if name in sys.modules])\n"
        "solov2.list_models()\n"
        "print('yaml' in sys.modules, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["[]", "True False"]


def broken_package(folder: Path, files: dict[str, str]) -> list[Source]:
    """A package `solov2` of the given files; the missing __init__ files are added."""
    for name, text in files.items():
        path = folder / "solov2" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for parent in path.parents:
            if parent == folder:
                break
            (parent / "__init__.py").touch()
    return read_package(folder / "solov2")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"data/coco.py": "from solov2.targets import T", "targets.py": ""}, "data must not import solov2.targets"),
        (
            {"data/coco.py": "def f():\n    from ..targets import T", "targets.py": ""},
            "data must not import solov2.targets",
        ),
        ({"models/head.py": "import solov2.config", "config.py": ""}, "models must not import solov2.config"),
        ({"models/head.py": "from .. import losses", "losses.py": ""}, "models must not import solov2.losses"),
        (
            {
                "losses.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from solov2.models import head",
                "models/head.py": "",
            },
            "losses must not import solov2.models.head",
        ),
        (
            {"engine.py": "from solov2.evaluation.coco import E", "evaluation/coco.py": ""},
            "engine must not import solov2.evaluation.coco",
        ),
        (
            {"build.py": "import importlib\nimportlib.import_module('solov2.visualize')", "visualize.py": ""},
            "build must not import solov2.visualize",
        ),
        ({"build.py": "import importlib\nname = 'x'\nimportlib.import_module(name)"}, "imports a computed module name"),
        ({"predict.py": "import solov2"}, "predict must not import solov2"),
        (
            {"ops/masks.py": "from solov2.config import Config", "config.py": ""},
            "ops may import only InputError from config",
        ),
        ({"config.py": "from solov2.nowhere import x"}, "solov2.nowhere does not exist"),
        ({"data/coco.py": "import cv2"}, "cv2 is not among the dependencies"),
        ({"logger.py": "from torch.utils import tensorboard"}, "must be imported inside a function"),
        ({"utils.py": ""}, "is not in the table of floors"),
    ],
)
def test_checker_finds_forbidden_imports(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    problems = import_violations(broken_package(tmp_path, files))
    assert len(problems) == 1 and expected in problems[0], problems


def test_checker_accepts_what_the_table_allows(tmp_path: Path) -> None:
    sources = broken_package(
        tmp_path,
        {
            "config.py": "import yaml",
            "ops/masks.py": "from solov2.config import InputError\nfrom .resize import r\nimport torch, numpy",
            "ops/resize.py": "",
            "logger.py": "def f():\n    from torch.utils.tensorboard import SummaryWriter",
            "commands/train.py": "from solov2 import ops, config\nfrom solov2.logger import f",
        },
    )
    assert import_violations(sources) == [] and import_cycle(sources) == []


def test_checker_finds_cycles(tmp_path: Path) -> None:
    sources = broken_package(
        tmp_path, {"ops/a.py": "from solov2.ops import b", "ops/b.py": "def f():\n    from .a import x"}
    )
    assert set(import_cycle(sources)) == {"solov2.ops.a", "solov2.ops.b"}


@pytest.mark.parametrize(
    "code",
    [
        "x.cuda()",
        "x.to('cuda')",
        "x.to(device='cuda:1')",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "load_it(f, weights_only=False)",
        "yaml.load(f)",
        "yaml.unsafe_load(f)",
        "run(c, shell=True)",
        "eval(text)",
    ],
)
def test_checker_finds_forbidden_code(tmp_path: Path, code: str) -> None:
    [source] = [item for item in broken_package(tmp_path, {"build.py": code}) if item.name == "solov2.build"]
    assert forbidden_code(source)


def test_checker_leaves_safe_code_alone(tmp_path: Path) -> None:
    code = "torch.load(f, weights_only=True)\nyaml.safe_load(f)\nmodel.eval()\nraise ValueError('no cuda here')"
    assert [forbidden_code(source) for source in broken_package(tmp_path, {"build.py": code})] == [[], []]


def test_checker_finds_missing_hints_and_docstrings(tmp_path: Path) -> None:
    code = "class A:\n    def f(self, x, *rest, y: int = 0): ...\ndef _hidden(z: int): 'private'"
    [source] = [item for item in broken_package(tmp_path, {"build.py": code}) if item.name == "solov2.build"]
    missing, total = unhinted_arguments(source)
    assert [name.split()[-1] for name in missing] == ["f(x)", "f(rest)"] and total == 4
    assert missing_docstrings(source) == [
        "solov2.build: no module docstring",
        "solov2.build:1 A: no docstring",
        "solov2.build:2 f: no docstring",
    ]
