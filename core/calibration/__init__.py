"""Second moments of the consumers' inputs along the pipeline's own trajectories."""

from .alpha import ALPHAS, Alpha, step_weights
from .calibrate import calibrate
from .calibration import Calibration
from .recorders import Layers

__all__ = ["ALPHAS", "Alpha", "Calibration", "Layers", "calibrate", "step_weights"]
