"""``fusewright verify``: whether the optimized engine trains a recipe as plain PyTorch does.

``command`` prepares the rows once, runs each of the ``ways`` (which samples, in which batches) in
separate processes, by ``worker``, and prints and writes what ``compare`` says of them.
"""
