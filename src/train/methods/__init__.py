"""Training on preferences, rewards and teachers: other losses in this engine's loop.

``task`` says what a recipe trains; ``table`` has a record for each method of preferences and
rewards, ``trainers`` and ``grpo`` their trainers with the losses of TRL, which is imported where a
method is trained, not before. ``objective`` is what these methods have in common, ``rows`` gives
prepared rows to them. ``distillation`` is training on a teacher's log-probabilities, without TRL.
"""
