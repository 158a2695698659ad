"""Checkpoints and final results of a run, and resuming."""
