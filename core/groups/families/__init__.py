"""One declarative file a family. Importing this package registers them all."""

from . import dit, flux, sd3, unet

__all__ = ["dit", "flux", "sd3", "unet"]
