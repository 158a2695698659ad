"""The optimizer steps, and what goes on around them."""
