"""The matcher: patterns built by calling functions on pattern objects, rules, their application."""
