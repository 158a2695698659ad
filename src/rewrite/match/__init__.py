"""Patterns, and matching them against nodes."""
