from __future__ import annotations

import re
from pathlib import Path

import pytest

import apot_fat
from tests.scripts.conftest import Run

ROOT = Path(__file__).resolve().parents[2]


def test_the_site_holds_every_public_name_and_guide_and_its_links_lead_somewhere(run: Run) -> None:
    pytest.importorskip("pdoc")
    code, _, err = run("docs.py", "site")
    assert (code, err) == (0, "")
    pages = {path: path.read_text(encoding="utf-8") for path in Path("site").rglob("*.html")}
    start = pages[Path("site/apot_fat.html")]
    assert [name for name in apot_fat.__all__ if f'id="{name}"' not in start] == []
    written = " ".join(pages.values())
    for guide in (ROOT / "apot_fat").rglob("README.md"):
        title = guide.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        assert f">{title}</h1>" in written
    for path, page in pages.items():
        for url in re.findall(r'(?:href|src)="([^"#:]+\.(?:html|png))(?:#[^"]*)?"', page):
            assert (path.parent / url).exists(), f"{path}: {url}"


def test_a_folder_that_cannot_be_written_is_one_line(run: Run) -> None:
    pytest.importorskip("pdoc")
    Path("taken").write_text("")
    code, out, err = run("docs.py", "taken")
    assert code in (2, 4)
    assert len((out + err).strip().splitlines()) == 1
