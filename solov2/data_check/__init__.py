"""Check a COCO dataset before training, and repair it."""
