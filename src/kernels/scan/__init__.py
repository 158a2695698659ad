"""Scans of state-space models."""
