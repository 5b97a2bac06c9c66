from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from apot_fat.gpu_check import SECTIONS, Check
from apot_fat.gpu_check.check import Found, Item

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    "sections", ["b,d", *(pytest.param(rest, marks=pytest.mark.slow) for rest in ("a,c,f", "e,g,h"))]
)
def test_every_section_runs_tiny_on_a_cpu(tmp_path: Path, sections: str) -> None:
    # in a process of its own: it registers a network, and chooses kernels and numerics
    line = [sys.executable, ROOT / "scripts" / "gpu_check.py", "--quick", "--device", "cpu", "--json", "rows.json"]
    line += ["--only", sections]
    done = subprocess.run(list(map(str, line)), cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "rows.json").read_text())
    assert content["environment"]["device"].startswith("cpu")
    assert {row["section"] for row in content["rows"]} == set(sections.split(","))
    assert {row["verdict"] for row in content["rows"]} == {"ok", "–"}, done.stdout
    for row in content["rows"]:
        assert f"\n{row['section']}  {row['what']} " in done.stdout


def test_an_error_is_a_row_and_the_rest_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Found:
        raise RuntimeError("out of\nluck")

    def one(check: Check) -> Iterator[Item]:
        yield "bad", fails
        yield "good", lambda: Found("fine")
        raise OSError("no more")

    def other(check: Check) -> Iterator[Item]:
        yield "wrong", lambda: Found("2", "1", "FAILED")

    monkeypatch.setitem(SECTIONS, "a", one)
    monkeypatch.setitem(SECTIONS, "b", other)
    code, out, err = run("gpu_check.py", "--only", "a,b", "--device", "cpu", "--json", "rows.json")
    assert code == 1
    rows = json.loads(Path("rows.json").read_text())["rows"]
    assert [(row["what"], row["value"], row["verdict"]) for row in rows] == [
        ("bad", "RuntimeError: out of luck", "FAILED"),
        ("good", "fine", "ok"),
        ("(preparation)", "OSError: no more", "FAILED"),
        ("wrong", "2", "FAILED"),
    ]
    assert "in fails" in rows[0]["traceback"]
    assert rows[0]["traceback"] in err
    assert "RuntimeError: out of luck" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--only", "a,x"), "--only 'x': choose of a, b, c, d, e, f, g, h"),
        (("--device", "tpu"), "device 'tpu': choose auto, cpu, cuda or cuda:N"),
        (("--json",), "expected one argument"),
    ],
)
def test_bad_input_is_one_line(run: Run, argv: tuple[str, ...], message: str) -> None:
    code, out, err = run("gpu_check.py", *argv)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
