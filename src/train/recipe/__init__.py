"""Recipes: their keys, reading and checking them."""
