"""What a model has, and what a step of it takes: counted without weights."""
