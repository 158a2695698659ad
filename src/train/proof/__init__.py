"""``fusewright verify``: whether the optimized engine trains a recipe as plain PyTorch does.

``command`` prepares the rows once and calls the others in order: ``ways`` (which samples, in which
batches, in which ways), ``run_ways`` (each in processes of its own, by ``worker``, with the keys of
``settings``; ``exact`` makes the model for the reference, ``record`` keeps what is compared),
``compare`` (deviations and verdicts), ``table`` (what is printed and written).
"""
