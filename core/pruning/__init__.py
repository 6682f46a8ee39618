"""Orders, levels and compensated consumers: from a calibration to a bank."""

from .bank import Bank, Consumer, ConsumerKey, fingerprint_of
from .layer_allocation import LayerAllocation
from .levels import DEFAULT_LEVELS, realised_sparsity
from .methods import methods, register_method
from .predecessors import Predecessors
from .prune import prune
from .sparse import NM, Pattern, Share, parse_pattern, sparsify

__all__ = [
    "DEFAULT_LEVELS",
    "NM",
    "Bank",
    "Consumer",
    "ConsumerKey",
    "LayerAllocation",
    "Pattern",
    "Predecessors",
    "Share",
    "fingerprint_of",
    "methods",
    "parse_pattern",
    "prune",
    "realised_sparsity",
    "register_method",
    "sparsify",
]
