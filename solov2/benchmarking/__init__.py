"""The benchmark: the real predictor, training step and loader, timed whole, and shared out to the spans in them."""
