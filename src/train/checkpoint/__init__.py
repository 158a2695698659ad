"""What is written while a run trains and at its end, and resuming from it."""
