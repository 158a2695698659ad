"""The size of a model, and the usage of a step: counted without weights."""
