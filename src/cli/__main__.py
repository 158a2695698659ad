"""``python -m fusewright.cli``: the command without its script."""

from .main import main

main()
