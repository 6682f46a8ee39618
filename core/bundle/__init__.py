"""Bundles: what is saved and shared."""

from .bundle import Bundle
from .hub import load_bundle
from .manifest import FORMAT_VERSION, MANIFEST

__all__ = ["FORMAT_VERSION", "MANIFEST", "Bundle", "load_bundle"]
