"""One declarative file a family. Importing this package registers them all."""

from . import dit, unet

__all__ = ["dit", "unet"]
