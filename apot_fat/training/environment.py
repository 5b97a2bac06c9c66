"""What a run was computed with: versions of the software, the commit and the device."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from functools import cache
from pathlib import Path

import torch

import apot_fat

_PACKAGES = ("torchvision", "numpy")
_ROOT = Path(__file__).resolve().parents[2]


@cache
def environment(device: torch.device) -> dict[str, str]:
    """Versions, commit, device and processor by name, as a checkpoint records them.

    ``commit`` is that of the checkout the package is run from, with ``+`` behind it where files differ from it; empty
    for an installed package. Looked up once: a run asks with every checkpoint.
    """
    # our own from the package: it may be run from a checkout that is not installed
    versions = {"torch": str(torch.__version__), "apot-fat": apot_fat.__version__}
    versions |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"commit": _commit(), "python": platform.python_version(), **versions, "device": f"{device}: {name}"}


def _commit() -> str:
    if not (_ROOT / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(_ROOT), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or another owner's checkout
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
