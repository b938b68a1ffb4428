"""Write the reference pages of this folder from the code: python docs/generate.py"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

import yaml

from solov2.commands.arguments import Parser
from solov2.commands.main import COMMANDS, command_module
from solov2.config import SECTIONS
from solov2.settings import Settings, rules

FOLDER = Path(__file__).parent

CONFIGURATION = """\
# Configuration

A configuration describes a network (`model`), its data (`data`) and its training (`train`). Each published model is a
file in `configs/`, and the name of the file is the name of the model. Your own file states only what differs from one
of them:

```yaml
# mine.yaml
base: solov2_r50_fpn_1x
data:
  train_scales: [640]
train:
  epochs: 6
```

`solov2 train mine.yaml` trains with it. `base` is the name of a model, or the path of another YAML file, relative to
the file that names it; that one may have a base of its own. Without `base`, the defaults below apply, which are those
of solov2_r50_fpn_1x. `name` is the name of the configuration; by default it is that of the file.

To change a single value you need no file: use the command line, or Python, where the section may be left out:

```bash
solov2 train solov2_r50_fpn_1x --set train.epochs=6 --set "data.train_scales=[640]"
```

```python
solov2.train("solov2_r50_fpn_1x", epochs=6, train_scales=[640])
solov2.build_model("solov2_r50_fpn_1x", score_threshold=0.3)  # settings of the model alone
```

An invalid value is refused, wherever it comes from, with a message that names the setting, the values it takes and the
value given. Sizes are in pixels. A relative path in `data` is relative to `data.root`.
"""


def configuration_page() -> str:
    """All settings, a table for each section."""
    tables = [f"## {name}\n\n{_first_line(cls)}\n\n{settings_table(cls)}\n" for name, cls in SECTIONS.items()]
    return "\n".join([CONFIGURATION, *tables])


def settings_table(cls: type[Settings]) -> str:
    """The settings of a section as a table."""
    rows = [("Setting", "Takes", "Default", "Meaning"), ("---",) * 4]
    own = rules(cls)
    for entry in dataclasses.fields(cls):
        rule = own[entry.name]
        rows.append((f"`{entry.name}`", rule.words, f"`{_yaml(entry.default)}`", rule.doc))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").partition("\n")[0]


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix("...\n").strip()


COMMANDS_INTRODUCTION = """\
# Commands

`solov2 COMMAND …` and `python -m solov2 COMMAND …` are the same, and `solov2 COMMAND --help` prints the same text.
`train.py`, `eval.py` and `benchmark.py` in a checkout are the commands of that name. Everything works offline except
`--weights official` and the ImageNet backbone, which are downloaded once.

A flag means the same in every command. `-` as the file of `--json` or `--results` stands for standard output; text for
people then goes to standard error. Figures in JSON are fractions. Exit codes: 0 done; 1 failed, or errors found by
check-data; 2 a user error, described in one sentence; 75 stopped by a signal or `--max-hours`, with a checkpoint; 130
interrupted by Ctrl-C.

`pip install 'solov2[completion]'` and `solov2 --print-completion bash` (or zsh, tcsh) make a completion script for a
shell.
"""


def commands_page() -> str:
    """All commands, a table for each."""
    parsers = {name: command_module(name).build_parser(f"solov2 {name}") for name in COMMANDS}
    tables = [f"## {parser.prog}\n\n{parser.description}\n\n{arguments_table(parser)}\n" for parser in parsers.values()]
    return "\n".join([COMMANDS_INTRODUCTION, *tables])


def arguments_table(parser: Parser) -> str:
    """What a command takes as a table, the positionals first."""
    formatter, actions = parser._get_formatter(), [action for action in parser._actions if action.dest != "help"]
    rows = [("Argument", "Meaning"), ("---",) * 2]
    for action in sorted(actions, key=lambda action: bool(action.option_strings)):
        required = " (required)" if action.option_strings and action.required else ""
        text = f"{formatter._expand_help(action)}{required}".replace("|", "\\|")
        rows.append((f"`{_invocation(action)}`", text))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _invocation(action: argparse.Action) -> str:
    names = action.metavar if isinstance(action.metavar, tuple) else (action.metavar or "",)
    value = f"{{{','.join(action.choices)}}}" if action.choices else " ".join(names)
    several = {"?": f"[{value}]", "+": f"{value}…"}.get(str(action.nargs), value)
    return f"{', '.join(action.option_strings)} {several}".strip()


def walk_page() -> str:
    """how_it_works.md with the lines at which its names are defined now."""
    text = (FOLDER / "how_it_works.md").read_text(encoding="utf-8")
    return re.sub(r"`([\w.]+)` \(([\w/]+\.py):\d+\)", _with_line, text)


def _with_line(anchor: re.Match[str]) -> str:
    name, path = anchor.groups()
    scope: ast.AST = ast.parse((FOLDER.parent / path).read_text(encoding="utf-8"))
    for part in name.split("."):
        scope = next(node for node in ast.iter_child_nodes(scope) if getattr(node, "name", None) == part)
    return f"`{name}` ({path}:{getattr(scope, 'lineno')})"  # noqa: B009  (a node in general has none)


PAGES = {"configuration.md": configuration_page, "commands.md": commands_page, "how_it_works.md": walk_page}


def main() -> None:
    """Write every page."""
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
