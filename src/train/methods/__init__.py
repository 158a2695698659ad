"""Training on preferences and rewards: TRL's trainers with this engine's loop and checkpoints.

``task`` says which of them a recipe asks for, and what it is made with; ``rows`` gives prepared
rows to them. ``tuner`` is what all of them have in common; ``direct``, ``odds`` and
``rewards`` are the methods. TRL is imported where a method is trained, not before.
"""
