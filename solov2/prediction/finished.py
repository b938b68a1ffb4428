"""The log of finished images in the output folder: a killed run resumes after them, and the files about all images,
such as COCO's results, are made from it at the end.

Each process appends to a file of its own. A line is written and flushed once all files of an image are complete.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from solov2.errors import InputError
from solov2.outputs import NAME_LENGTH

try:
    import fcntl
except ImportError:  # Windows: nothing stops two runs in one folder
    fcntl = None  # type: ignore[assignment]

PATTERN = "finished_*.jsonl"


class FinishedLog:
    """Appends to the log of this process.

    Args:
        folder: of the outputs; created as needed.
        rank: of this process.
        settings: what the results depend on, ready for JSON; a run with others must not resume this one.

    Raises:
        InputError: a process of an earlier run is still alive and writes there.
    """

    def __init__(self, folder: Path, rank: int, settings: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / PATTERN.replace("*", str(rank))
        self._file = open(path, "a", encoding="ascii")
        try:
            if fcntl is not None:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends, however it does
        except BlockingIOError:
            raise InputError(f"a process of an earlier run still writes to {folder}; end it first") from None
        text = path.read_bytes()
        self._file.truncate(text.rfind(b"\n") + 1)  # a killed process may have left a part of a line
        self.add({"settings": dict(settings)})

    def add(self, line: Mapping[str, Any]) -> None:
        """Append a line; if the process is killed meanwhile, the line is complete, or it is the last and is ignored."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_finished(folder: Path, settings: Mapping[str, Any] | None = None) -> dict[str, list[dict[str, Any]]] | None:
    """The lines of what all processes have finished, by `name`; None if there is no log.

    An image has one line. Lines with a `frame`, counted from 1, count once the video has a line with its `frames`.

    Args:
        folder: of the outputs.
        settings: of the run that is resumed; None: not compared.

    Raises:
        InputError: the log was written with other settings.
    """
    finished: dict[str, list[dict[str, Any]]] = {}
    paths = sorted(folder.glob(PATTERN))
    for path in paths:
        begun: list[dict[str, Any]] = []  # frames of the current video
        for text in path.read_text(encoding="ascii").splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # the last one of a killed process
                continue
            if "settings" in line:
                _compare(folder, line["settings"], settings)
            elif "frames" in line:
                finished[line["name"]], begun = begun, []
            elif "frame" in line:
                if line["frame"] == 1:
                    begun = []
                begun.append(line)
            else:
                finished[line["name"]] = [line]
    return finished if paths else None


def _compare(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any] | None) -> None:
    for key in before if now is not None else ():
        if now is not None and before[key] != now.get(key):
            raise InputError(
                f"the run in {folder} was started with {key} {before[key]}, not {now.get(key)}; resume it with the "
                "same arguments, or start again with --overwrite"
            )


def remove_logs(folder: Path) -> None:
    """Remove the logs of all processes, when the run is complete or starts again."""
    for path in folder.glob(PATTERN):
        path.unlink()


def remove_temporary_files(outputs: Collection[Path]) -> None:
    """Remove what `replace_file` leaves of these files when its process is killed."""
    for folder in {path.parent for path in outputs}:
        names = {path.name[:NAME_LENGTH] for path in outputs if path.parent == folder}
        for path in folder.glob(".*.tmp"):
            found = re.fullmatch(r"\.(.*)\.[0-9a-f]{8}\.tmp", path.name)
            if found and found[1] in names:
                path.unlink()
