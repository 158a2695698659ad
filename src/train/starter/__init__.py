"""``fusewright init``: a commented starter recipe for somebody's rows, model and memory.

``shapes`` says what one row is, ``look`` reads the rows, ``measure`` counts their tokens,
``candidates`` lists the adapters and lengths to try, ``fits`` judges memory, ``choose`` picks the
keys, and ``write`` writes them with their reasons. ``init`` calls them in this order.
"""
