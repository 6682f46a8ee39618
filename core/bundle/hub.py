"""From a name to a bundle: a local folder, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import BundleError
from .bundle import Bundle
from .manifest import MANIFEST, TENSORS


def load_bundle(name: str | Path, revision: str | None = None) -> Bundle:
    """Load a bundle by folder, or by Hub id (`user/name`) if no such folder exists.

    Args:
        name: folder or Hub id.
        revision: branch, tag or commit of the Hub repository.

    Raises:
        BundleError: neither exists, or the bundle is invalid.
    """
    if Path(name).exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        return Bundle.load(name)
    from huggingface_hub import snapshot_download  # noqa: PLC0415  (not needed for local bundles)
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        folder = snapshot_download(str(name), revision=revision, allow_patterns=[MANIFEST, TENSORS, "README.md"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BundleError(f"{name}: no such folder, and the Hub gave no such repository ({error}).") from None
    return Bundle.load(folder)
