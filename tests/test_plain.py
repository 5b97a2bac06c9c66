from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch

from apot_fat import plain as room
from apot_fat.plain import DEEPEST, plain


def test_what_is_plain_stays_and_the_rest_becomes_so() -> None:
    parameter = torch.nn.Parameter(torch.rand(3))
    parameter.flatten = "an attribute in place of a method"  # type: ignore[assignment,method-assign]
    state = OrderedDict(w=parameter, c=torch.tensor([1 + 2j]).conj())
    state.items = None  # type: ignore[assignment,method-assign]
    copied = plain({"state": state, "rows": [1, (2.5, None, "a"), {3}], (1, 2): b"x"}, "file")
    assert type(copied["state"]) is dict
    assert torch.equal(copied["state"]["w"].flatten(), parameter.detach())
    assert not copied["state"]["w"].requires_grad
    assert copied["state"]["c"].numpy() == 1 - 2j
    assert {key: copied[key] for key in ("rows", (1, 2))} == {"rows": [1, (2.5, None, "a"), {3}], (1, 2): b"x"}


def nested(levels: int, make: Any) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = make(value)
    return value


@pytest.mark.parametrize("make", [lambda v: [v], lambda v: (v,), lambda v: {"a": v}])
def test_deep_nesting_is_refused_and_what_files_hold_is_not(make: Any) -> None:
    plain(nested(20, make), "file")
    for levels in (DEEPEST + 1, 100_000):
        with pytest.raises(ValueError, match=r"^file: nested more than 100 levels deep"):
            plain(nested(levels, make), "file")
    with pytest.raises(ValueError, match="levels deep"):
        plain({nested(DEEPEST + 1, lambda v: (v,)): 1}, "file")


def test_lists_that_hold_themselves_or_one_another_end(monkeypatch: pytest.MonkeyPatch) -> None:
    round_and_round: list[Any] = []
    round_and_round.append(round_and_round)
    with pytest.raises(ValueError, match="levels deep"):
        plain(round_and_round, "file")
    monkeypatch.setattr(room, "MOST_VALUES", 10_000)
    with pytest.raises(ValueError, match=r"^file: holds more than 10,000 values"):
        plain(nested(50, lambda v: [v] * 10), "file")


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (torch.eye(2).to_sparse(), "sparse or ragged"),
        (torch.empty(2, device="meta"), r"without values \(meta\)"),
        (torch.zeros(1).expand(10**12), r"expanded to \(1000000000000,\) from fewer values"),
        (torch.zeros(4, 1).expand(4, 5), r"expanded to \(4, 5\) from fewer values"),
    ],
)
def test_tensors_that_do_not_hold_their_values_are_named(tensor: torch.Tensor, what: str) -> None:
    with pytest.raises(ValueError, match=rf"^file: state\.0\.w: a tensor {what}; expected one that holds each"):
        plain({"state": [{"w": tensor}]}, "file")
    plain({"shared": torch.zeros(4)[1:3], "empty": torch.empty(0, 3), "turned": torch.zeros(2, 3).T}, "file")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # PyTorch gives them up
def test_tensors_that_pytorch_quantized_are_named() -> None:
    with pytest.raises(ValueError, match="file: w: a tensor quantized by PyTorch"):
        plain({"w": torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.qint8)}, "file")
