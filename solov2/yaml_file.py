"""YAML files: small regular files of plain values, without what YAML forbids and PyYAML accepts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from solov2.errors import InputError

MAX_BYTES = 2**17  # our longest configuration has 2,000 bytes, and PyYAML needs ten seconds for a megabyte
MAX_NODES = 2**17  # with aliases written out


def read_yaml(path: Path) -> Any:
    """The plain value of a YAML file in UTF-8; None if it is empty.

    Raises:
        InputError: the file cannot be read, is not a regular file, is too large, or is refused by `parse_yaml`.
    """
    try:
        if not os.path.isfile(path):  # opening a FIFO would wait for a writer
            raise InputError(f"{path} {'is not a regular file' if os.path.exists(path) else 'does not exist'}")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read configuration {path}: {error.strerror or error}") from error
    if len(content) > MAX_BYTES:
        raise InputError(f"{path} is too large to be a configuration, which has at most {MAX_BYTES:,} bytes")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not valid YAML: it is not text in UTF-8 ({error})") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Any:
    """The plain value of a YAML text, as from `yaml.safe_load`; None if it is empty.

    Raises:
        InputError: invalid YAML, other than plain values, a key that occurs twice in one mapping, too many
            aliases or too deep nesting; the message names `source`.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_nodes(node, {}) > MAX_NODES:
            raise InputError(f"{source} has aliases (*) that stand for more than {MAX_NODES:,} values")
        return loader.construct_document(node)
    except InputError:
        raise
    except RecursionError as error:
        raise InputError(f"{source} is nested too deeply to be a configuration") from error
    except Exception as error:  # PyYAML raises LookupError, AttributeError, ... for tags that do not fit a value
        hint = "; indent with spaces, not tabs" if "'\\t'" in str(error) else ""
        raise InputError(f"{source} is not valid YAML of plain values: {' '.join(str(error).split())}{hint}") from error


def _count_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of nodes below and including one, with aliases written out; a merge key (<<) would write them out.

    Raises:
        yaml.YAMLError: a key occurs twice in a mapping; PyYAML would silently keep the last value.
    """
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = 1  # of an alias inside the node that it stands for
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            children += [key, value]
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    raise yaml.YAMLError(f"key {key.value!r} occurs twice, in lines {lines[name]} and {line}")
                lines[name] = line
    known[id(node)] = 1 + sum(_count_nodes(child, known) for child in children)
    return known[id(node)]
