"""What a run of the tests left out, and how to run it, in one line."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_NEEDS = {
    "CUDA": "need a CUDA GPU (pytest -m gpu)",
    "Chromium": "need Chromium (apt-get install chromium chromium-driver)",
    "APOT_FAT_REFERENCE": "need reference data (APOT_FAT_REFERENCE=FOLDER)",
    "make toolchains": "need compilers and emulators (make toolchains)",
    "could not import|pip install|triton": "need a package (pip install 'apot-fat[dev]')",
}
"""What a test needs by the words of its reason to be skipped."""


def left_out(reasons: Iterable[str], slow: int) -> str:
    """The line, empty where nothing was left out.

    Args:
        reasons: of each test that was skipped.
        slow: how many slow tests were not asked for.
    """
    needs = Counter(_need(reason) for reason in reasons)
    parts = [f"{needs.total()} skipped: {', '.join(f'{n} {need}' for need, n in needs.most_common())}"] if needs else []
    parts += [f"slow tests left out: {slow} (pytest -m slow)"] if slow else []
    return "; ".join(parts)


def _need(reason: str) -> str:
    found = (need for words, need in _NEEDS.items() if re.search(words, reason))
    return next(found, reason.removeprefix("Skipped: "))
