"""The benchmark: the real step and the real post-processing, stage by stage."""
