"""Training on preferences, rewards and teachers: other losses in the same loop.

``task`` selects what a recipe trains. ``table`` has the trainer and the record of each method of
preferences and rewards, ``grpo`` those of GRPO, with the losses of TRL, which is imported only
where such a method is trained. ``objective`` is what these methods have in common, ``build`` makes
their trainers, ``rows`` their datasets and batches. ``distillation`` is training on a teacher's
log-probabilities, without TRL.
"""
