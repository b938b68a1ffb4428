"""Annotations of other tools, read into one representation, and written in COCO's format or in theirs.

Each format is one module: `read(source, images)` gives a `Reading`; `labelme`, `yolo` and `masks` also `write` one.
"""
