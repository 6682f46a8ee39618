"""Ways to choose a level for each stage under a budget; importing this registers them."""

from . import hand, joint, measured, mosaic, pattern, uniform

__all__ = ["hand", "joint", "measured", "mosaic", "pattern", "uniform"]
