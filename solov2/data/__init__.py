"""Data sets, transforms and loaders: from COCO annotations to batches."""
