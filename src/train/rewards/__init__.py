"""What judges completions, for methods that learn from rewards.

``built_in`` has the rewards that a recipe can name without code of its own; ``load`` finds all
those of a recipe, ``judge`` calls them, and ``watch`` notices where nothing is learnt from them.
"""
