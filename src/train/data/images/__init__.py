"""Images of rows.

``picture`` opens and checks them, ``expansion`` places them in texts, ``features`` makes what a
model takes of them when a batch is made, ``unchanged`` tells whether cached rows still have the
same, and ``reading`` makes all of that of a recipe.
"""
