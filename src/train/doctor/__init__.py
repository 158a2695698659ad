"""``fusewright doctor``: what this machine has for training, and what mends each gap.

``packages`` (versions), ``machine`` (CPU, memory, GPUs), ``imports``, ``compiler`` and
``libraries`` (what is tried out), ``rules`` (which implementation each rewrite has here, asked with
``samples``) find out, in another process that ``child`` watches: a broken library may end it.
``report`` puts each ``result`` into a table, and says what mends the gaps.
"""
