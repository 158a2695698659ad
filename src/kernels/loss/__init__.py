"""Losses that never make the logits."""
