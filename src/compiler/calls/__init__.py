"""Calls of an optimized model's modules: which run a captured graph, and which run as they were."""
