"""One declarative file a family. Importing this package registers them all."""

from . import dit

__all__ = ["dit"]
