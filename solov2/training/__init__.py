"""Training: one optimizer step, the epochs, the run folder, checkpoints and resuming."""
