"""Plans a run from its configuration alone: memory, time, and number of devices."""
