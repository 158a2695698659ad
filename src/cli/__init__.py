"""The commands. What a command needs is imported when it runs."""

from .main import main

__all__ = ["main"]
