"""Where the files lie that travel with the package: recipes, the manifest and packed checkpoints.

The top-level folders ``configs/``, ``checkpoints/`` and ``models/`` of a checkout are folders of the package once it is
installed.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

PACKAGE = Path(str(files("apot_fat")))


def package_folder(name: str) -> Path:
    """A folder that travels with the package: within it where it is installed, beside it in a checkout."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name
