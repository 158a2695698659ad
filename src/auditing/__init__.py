"""Judge a training step, whoever built it: is what should be trained trained, and as PyTorch would?

``audit`` runs the ``checks`` on a model and a batch; ``watch`` runs them in somebody's training
loop, at its first step and at its end. Both return a ``Audit`` of ``findings``.
"""
