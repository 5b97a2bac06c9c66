from __future__ import annotations

from tests.left_out import left_out


def test_what_was_left_out_is_one_line_that_says_how_to_run_it() -> None:
    reasons = ["Skipped: no CUDA device on this machine"] * 2
    reasons += ["Skipped: needs Chromium and chromedriver: apt-get install chromium chromium-driver"] * 3
    reasons += ["Skipped: not a git checkout"]
    assert left_out(reasons, 144) == (
        "6 skipped: 3 need Chromium (apt-get install chromium chromium-driver), 2 need a CUDA GPU (pytest -m gpu), "
        "1 not a git checkout; slow tests left out: 144 (pytest -m slow)"
    )
    assert left_out([], 1) == "slow tests left out: 1 (pytest -m slow)"
    assert left_out([], 0) == ""
