"""Write the reference pages of every public name, with the guides that lie beside the code: docs.py [FOLDER]."""

from __future__ import annotations

import os
import re
import shutil
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pdoc

import apot_fat
from apot_fat.command_line import run_main

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "apot_fat": ("README.md", "apot_fat/README.md"),
    "apot_fat.quant": ("apot_fat/quant/fast/README.md",),
    "apot_fat.quant.convert": ("apot_fat/quant/convert/README.md",),
    "apot_fat.training": ("apot_fat/training/README.md",),
    "apot_fat.models": (),
    "apot_fat.data": (),
    "apot_fat.checkpoint": ("checkpoints/README.md",),
    "apot_fat.export": ("apot_fat/export/README.md",),
    "apot_fat.integer": ("apot_fat/integer/README.md",),
    "apot_fat.reporting": (),
}
"""Modules, and the guides that are part of their pages."""


def main(argv: list[str] | None = None) -> None:
    """Write the site; a warning of pdoc's is an error."""
    folder = Path((argv if argv is not None else sys.argv[1:] or ["site"])[0])
    for name in apot_fat.__all__:
        getattr(apot_fat, name)  # imported when first asked for
    for name, guides in PAGES.items():
        module = import_module(name)
        module.__doc__ = "\n\n".join([module.__doc__ or "", *(_guide(ROOT / guide, name) for guide in guides)])
        for kind in vars(module).values():
            if isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields"):
                kind.__new__.__annotations__ = get_type_hints(kind)  # pdoc does not find what they name
    pdoc.render.configure(docformat="google", footer_text=f"apot-fat {apot_fat.__version__}", show_source=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc(*PAGES, output_directory=folder)
    for picture in (ROOT / ".github").glob("*.png"):
        shutil.copy(picture, folder)


def _guide(path: Path, page: str) -> str:
    # with links to pages and pictures of the site; what else is linked in the checkout keeps its name alone
    homes = {(ROOT / guide).resolve(): module for module, guides in PAGES.items() for guide in guides}
    here = Path(page.replace(".", "/")).parent

    def moved(link: re.Match[str]) -> str:
        picture, text, target, anchor = link.groups(default="")
        if "://" in target or not target:
            return link[0]
        found = (path.parent / target).resolve()
        if picture:
            return f'<img src="{os.path.relpath(found.name, here)}" alt="{text}" style="max-width: 100%">'
        if found not in homes:
            return text
        return f"[{text}]({os.path.relpath(homes[found].replace('.', '/') + '.html', here)}{anchor})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)#]*)(#[^)]*)?\)", moved, path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_main(main)
