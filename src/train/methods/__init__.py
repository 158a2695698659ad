"""Training on preferences, rewards and teachers: other losses in this engine's loop.

``task`` says which of them a recipe asks for, and what it is made with; ``rows`` gives prepared
rows to them. ``tuner`` is what all of them have in common; ``direct``, ``odds`` and
``rewards`` are the methods, with the losses of TRL, which is imported where a method is trained,
not before. ``distillation`` is training on a teacher's log-probabilities, without TRL.
"""
