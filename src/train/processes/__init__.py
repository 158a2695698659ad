"""Several processes: who starts them, which of them this one is, and how they agree."""
