"""The benchmark: time the real predictor, training step and loader, and divide the time among their spans."""
