"""Rewards for completions, for methods that learn from them.

``built_in`` has the rewards that a recipe can name without code, and finds all those of a recipe;
``judge`` calls them, and notices where nothing is learnt from them.
"""
