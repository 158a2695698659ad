"""The optimizer steps, and what happens around them."""
