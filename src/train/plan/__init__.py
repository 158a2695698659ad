"""What a recipe will take, from its configuration alone: memory, time, and how many devices."""
