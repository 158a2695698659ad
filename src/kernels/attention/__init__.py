"""Attention, and the rotation of its queries and keys."""
