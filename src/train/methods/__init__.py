"""Training on preferences, rewards and teachers: other losses in this engine's loop.

``task`` says what a recipe trains. ``table`` has the trainer and the record of each method of
preferences and rewards, ``grpo`` those of GRPO, with the losses of TRL, which is imported where a
method is trained, not before. ``objective`` is what these methods have in common, ``build`` makes
their trainers, ``rows`` gives prepared rows to them. ``distillation`` is training on a teacher's
log-probabilities, without TRL.
"""
