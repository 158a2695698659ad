"""Tiny twins of checkpoints: recipes run on small models of the same type.

    python -m tests.tools.twins AXOLOTL/examples                 # all recipes below a folder
    python -m tests.tools.twins AXOLOTL/examples llama-3 --plain # some of them, without rewrites
    python -m tests.tools.twins AXOLOTL/examples --write         # all; docs/axolotl.md, README

For a recipe, ``checkpoint`` makes a model of the type of its ``base_model`` with a few small
layers, and a tokenizer; ``rows`` a few rows of its datasets' formats. ``run`` trains two steps, and
loads what is saved with transformers and PEFT alone. ``page`` writes the table.
"""
