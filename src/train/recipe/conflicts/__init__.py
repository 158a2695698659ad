"""Keys of a recipe that are valid alone, but not together.

``together`` has those that conflict, ``without_effect`` those that nothing reads beside others.
"""

from .together import conflicts
from .without_effect import without_effect

__all__ = ["conflicts", "without_effect"]
