"""Functions and modules that are captured as one node."""
