"""Patterns, built by calling functions on pattern objects, rules, and their application."""
