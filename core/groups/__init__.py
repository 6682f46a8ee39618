"""Groups of prunable units: what they are, which a denoiser has, what they cost, and the slice == mask check."""

from ..host import InputSize
from . import families as _families  # noqa: F401  (registers the built-in families)
from .check import GroupCheck, check_slice_equals_mask
from .cost import DenoiserCost, measure_cost
from .group import Attribute, Cols, Group, Rows, Term, UnitCost, consumer_sites, width_groups
from .registry import Family, families, family_of, find_groups, register_family
from .sites import InputSite, input_sites, layer_paths

__all__ = [
    "Attribute",
    "Cols",
    "DenoiserCost",
    "Family",
    "Group",
    "GroupCheck",
    "InputSite",
    "InputSize",
    "Rows",
    "Term",
    "UnitCost",
    "check_slice_equals_mask",
    "consumer_sites",
    "families",
    "family_of",
    "find_groups",
    "input_sites",
    "layer_paths",
    "measure_cost",
    "register_family",
    "width_groups",
]
