"""Copies of forwards that see other globals, for one call."""
