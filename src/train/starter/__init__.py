"""``fusewright init``: a commented starter recipe for somebody's rows, model and memory.

``shapes`` says what one row is, ``look`` reads the rows, ``measure`` counts their tokens, ``fits``
judges memory, ``choose`` picks the keys, and ``write`` puts them down with the reasons. ``init``
calls them one after the other.
"""
