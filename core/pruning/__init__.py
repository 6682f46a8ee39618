"""Orders, levels and compensated consumers: from a calibration to a bank."""

from .bank import Bank, Consumer, ConsumerKey, fingerprint_of
from .levels import DEFAULT_LEVELS, realised_sparsity
from .methods import methods, register_method
from .prune import prune

__all__ = [
    "DEFAULT_LEVELS",
    "Bank",
    "Consumer",
    "ConsumerKey",
    "fingerprint_of",
    "methods",
    "prune",
    "realised_sparsity",
    "register_method",
]
