"""The model of a run: finding, loading, quantizing, adapting."""
