"""Plant faults in the results of a trained model and print what its report names first.

    python tests/scripts/planted_faults.py RUN SHAPES FOLDER

RUN is the folder of a quickstart run, SHAPES that of its data. Faults of the results are planted in a file of them and
reported by `eval --predictions FILE --report PAGE`; those of the settings by `eval --weights FILE --set ... --report`.
"""

from __future__ import annotations

import argparse
import html
import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

from solov2.commands.evaluate import main as evaluate

Result = dict[str, Any]
SHARE = 0.4  # of the instances, without which a result is "missing instances"
CUT = 0.6  # of the scores
SHIFT = 10  # pixels, of objects of about 40


def swapped(results: list[Result], truth: COCO) -> list[Result]:
    """The first two classes exchanged."""
    first, second = sorted(truth.cats)[:2]
    other = {first: second, second: first}
    return [{**x, "category_id": other.get(x["category_id"], x["category_id"])} for x in results]


def shifted(results: list[Result], truth: COCO) -> list[Result]:
    """Every mask moved to the right."""
    moved = []
    for x in results:
        mask = np.roll(mask_api.decode(x["segmentation"]), SHIFT, axis=1)
        mask[:, :SHIFT] = 0
        moved.append({**x, "segmentation": encoded(mask)})
    return moved


def missing(results: list[Result], truth: COCO) -> list[Result]:
    """Nothing predicted where some of the instances are."""
    chooser, kept = random.Random(0), []
    for image_id in truth.imgs:
        known = [truth.annToRLE(a) for a in truth.imgToAnns[image_id] if chooser.random() < SHARE]
        own = [x for x in results if x["image_id"] == image_id]
        if known and own:
            ious = np.asarray(mask_api.iou([x["segmentation"] for x in own], known, [0] * len(known)))
            own = [x for x, row in zip(own, ious) if row.max() < 0.1]
        kept += own
    return kept


def doubled(results: list[Result], truth: COCO) -> list[Result]:
    """Every instance twice, the second a pixel further and with a slightly lower score."""
    moved = [encoded(np.roll(mask_api.decode(x["segmentation"]), 1, axis=0)) for x in results]
    copies = [{**x, "segmentation": rle, "score": 0.98 * x["score"]} for x, rle in zip(results, moved)]
    return [*results, *copies]


def encoded(mask: np.ndarray) -> Mapping[str, Any]:
    rle = mask_api.encode(np.asfortranarray(mask))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def first_of(page: Path) -> str:
    """The first entry of the ranked list of a page, as text."""
    found = re.search(r'<ol class="findings"><li>(.*?)</li>', page.read_text(encoding="utf-8"))
    return html.unescape(re.sub(r"<[^>]+>", "", found[1].replace("<br>", " "))) if found else "nothing"


FAULTS = {"swapped classes": swapped, "shifted masks": shifted, "missing instances": missing,
          "doubled instances": doubled}  # fmt: skip
SETTINGS = {
    "a threshold too high": f"model.score_threshold={CUT}",
    "grids too coarse": "model.grid_sizes=[4,3,2,2,1]",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("shapes", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    model = ["--weights", str(args.run / "best.pth"), "--data-root", str(args.shapes), "--device", "cpu", "--overwrite"]
    results = args.folder / "results.json"
    page = args.folder / "as_trained.html"
    assert evaluate([*model, "--results", str(results), "--report", str(page)]) == 0
    print(f"as trained: {first_of(page)}", flush=True)
    annotations = args.shapes / "annotations" / "instances_val2017.json"
    truth, found = COCO(str(annotations)), json.loads(results.read_text())
    for name, plant in FAULTS.items():
        file, page = (args.folder / f"{name.replace(' ', '_')}{end}" for end in (".json", ".html"))
        file.write_text(json.dumps(plant(found, truth)))
        words = ["--predictions", str(file), "--val-annotations", str(annotations), "--overwrite"]
        assert evaluate([*words, "--report", str(page)]) == 0
        print(f"{name}: {first_of(page)}", flush=True)
    for name, setting in SETTINGS.items():
        page = args.folder / f"{name.replace(' ', '_')}.html"
        assert evaluate([*model, "--set", setting, "--report", str(page)]) == 0
        print(f"{name}: {first_of(page)}", flush=True)


if __name__ == "__main__":
    main()
