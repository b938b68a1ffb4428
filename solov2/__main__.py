"""`python -m solov2 COMMAND ...`, which is also what the `solov2` command runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train a model on data in COCO's format",
    "eval": "COCO mask AP and box AP of a model",
    "predict": "segment photographs and draw what was found",
    "benchmark": "images per second, stage by stage",
    "check-data": "what is wrong with a data set, and a repaired copy",
    "export": "write a model as one graph (.pt2, .onnx)",
    "convert": "write a checkpoint under the names of another family",
}
MODULES = {"eval": "evaluate"}  # of the commands that are not called like their module


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        module = MODULES.get(words[0], words[0].replace("-", "_"))
        try:
            return importlib.import_module(f"solov2.commands.{module}").main(words[1:])
        except KeyboardInterrupt:
            if argv is not None:
                raise
            return 130
    width = max(map(len, COMMANDS))
    lines = ["usage: solov2 COMMAND ... (solov2 COMMAND --help says more)", ""]
    lines += [f"  {name:<{width}}  {purpose}" for name, purpose in COMMANDS.items()]
    asked = not words or words[0] in ("-h", "--help")
    print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
    if not asked:
        print(f"error: unknown command '{words[0]}'", file=sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
