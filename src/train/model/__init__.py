"""Finds, loads, quantizes and adapts the model of a run."""
