"""``fusewright init``: a commented starter recipe for given rows, model and memory.

``look`` reads the rows, ``candidates`` counts their tokens and lists the adapters and lengths to
try, ``choose`` picks the keys that fit the memory, and ``init`` calls them in this order and writes
the recipe with its reasons.
"""
