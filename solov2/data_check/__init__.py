"""Checking a COCO data set before training, and repairing it."""
