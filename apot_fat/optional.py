"""Packages that only a part of the project needs: they are imported where they are used, and may be missing."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager

from apot_fat.text import one_line

_EXPORT = "apot-fat[export]"
_INSTALLED_AS = {
    "onnx": _EXPORT,
    "onnxruntime": _EXPORT,
    "onnxscript": _EXPORT,
    "qonnx": "apot-fat[qonnx]",
    "sklearn": "scikit-learn",
    "vl_convert": "vl-convert-python",
}


class MissingPackageError(ValueError):
    """A package that something needs is not installed."""


@contextmanager
def needed_for(purpose: str) -> Iterator[None]:
    """Around the imports of packages that may be missing.

    Args:
        purpose: what needs them, such as ``the export to ONNX``.

    Raises:
        MissingPackageError: one is missing or does not load; names it, and the line that installs it.
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        reason = "" if isinstance(error, ModuleNotFoundError) else f", which does not load ({one_line(error)})"
        line = f"pip install {shlex.quote(_INSTALLED_AS.get(package, package))}"
        raise MissingPackageError(f"{purpose} needs {package}{reason}: {line}") from error
