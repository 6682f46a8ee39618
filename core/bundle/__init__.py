"""Bundles: what is saved and shared."""

from .bundle import Bundle, check_bundle_folder
from .hub import load_bundle
from .manifest import FORMAT_VERSION, MANIFEST

__all__ = ["FORMAT_VERSION", "MANIFEST", "Bundle", "check_bundle_folder", "load_bundle"]
