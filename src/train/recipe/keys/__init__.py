"""The keys of a recipe, by subject. Each says its type, default, meaning, unit and status.

The vocabulary is Axolotl's; ``fusewright`` is fusewright's own.
"""
