"""``fusewright doctor``: what this machine has for training, and what mends each gap.

``packages`` (versions), ``machine`` (CPU, memory, GPUs), ``imports``, ``compiler`` and
``libraries`` (tried out by using them) and ``rules`` (which implementation each rewrite has here,
by its ops' examples) make the checks. They run in a child process that ``child`` watches, because a
broken library may end it. ``report`` prints each ``result`` in a table, and what mends the gaps.
"""
