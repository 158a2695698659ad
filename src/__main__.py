"""``python -m fusewright``: the command without its script."""

from .cli.main import main

main()
