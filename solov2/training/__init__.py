"""Training: one step, the epochs, the run, and what survives its end."""
