"""Second moments of the consumers' inputs along the pipeline's own trajectories."""

from .alpha import ALPHAS, Alpha, step_weights
from .calibrate import calibrate
from .calibration import Calibration

__all__ = ["ALPHAS", "Alpha", "Calibration", "calibrate", "step_weights"]
