"""Bits for each layer: what each costs the network's output, and the best choice under a budget."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from apot_fat.optional import needed_for
from apot_fat.quant.convert.batches import Calibration, count_inputs, first_batches, read_batches, run_batch
from apot_fat.quant.convert.calibration import run_quantized
from apot_fat.quant.convert.layer import leave_fast_paths
from apot_fat.quant.convert.network import convert_planned, refuse_idle, relative_error, unchanged
from apot_fat.quant.convert.norms import move_batch_norms
from apot_fat.quant.convert.plan import NetworkPlan, base_spec, plan_network
from apot_fat.quant.layers import AnyQuantized
from apot_fat.quant.spec import check_bits
from apot_fat.quant.watching import evaluation_mode, watch_outputs
from apot_fat.text import aligned, bar

MOST_INPUTS = 256
"""Calibration inputs that the cost of each layer's bits is measured on: each costs a pass for every layer and bits."""


@dataclass(frozen=True)
class AllocatedLayer:
    """One row of an ``Allocation``.

    Args:
        bits: of its weight and input.
        weights: how many.
        macs: multiply-accumulates for one input.
        losses: squared relative error of the network's output with this layer alone at each of the choices.
    """

    name: str
    bits: int
    weights: int
    macs: int
    losses: Mapping[int, float]

    @property
    def bytes(self) -> int:
        """Of the weight, packed to the bit and rounded up."""
        return -(-self.weights * self.bits // 8)

    @property
    def bit_operations(self) -> int:
        """macs · bits², for one input."""
        return self.macs * self.bits**2


@dataclass(frozen=True)
class Allocation(Mapping[str, dict[str, int]]):
    """Bits of each layer: what ``quantize`` takes as ``overrides``. Printed, an aligned table.

    Args:
        rows: one a layer, in the order in which they run.
    """

    rows: tuple[AllocatedLayer, ...]

    def __getitem__(self, pattern: str) -> dict[str, int]:
        for row in self.rows:
            if glob.escape(row.name) == pattern:
                return {"bits": row.bits}
        raise KeyError(pattern)

    def __iter__(self) -> Iterator[str]:
        return (glob.escape(row.name) for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def average(self) -> float:
        """Bits a weight."""
        return sum(row.weights * row.bits for row in self.rows) / sum(row.weights for row in self.rows)

    @property
    def bytes(self) -> int:
        """Of all weights."""
        return sum(row.bytes for row in self.rows)

    @property
    def bit_operations(self) -> int:
        """For one input."""
        return sum(row.bit_operations for row in self.rows)

    @property
    def error(self) -> float:
        """Predicted relative error of the network's output: the root of the layers' losses added up."""
        return float(sum(row.losses[row.bits] for row in self.rows)) ** 0.5

    def table(self) -> str:
        """The rows as an aligned table: losses at each of the choices, those taken in brackets."""
        choices = list(self.rows[0].losses)
        largest = max(row.bits for row in self.rows)
        head = ["name", "bits", "", "weights", "macs", "bytes", *(f"loss at {bits}" for bits in choices)]
        cells = []
        for row in self.rows:
            losses = (f"[{row.losses[b]:.2g}]" if b == row.bits else f"{row.losses[b]:.2g}" for b in choices)
            counts = (f"{n:,}" for n in (row.weights, row.macs, row.bytes))
            cells.append([row.name, str(row.bits), bar(row.bits, largest, 8), *counts, *losses])
        return aligned(head, cells, left=["name", ""])

    def __str__(self) -> str:
        counts = f"{self.bytes:,} bytes, {self.bit_operations:,} bit-operations an input"
        return f"{self.table()}\n{self.average:.3f} bits a weight, {counts}; predicted error {self.error:.3g}"


@torch.inference_mode(False)
@torch.no_grad()
def allocate_bits(
    model: nn.Module,
    calibration: Calibration,
    average: float | None = None,
    choices: Sequence[int] = (2, 3, 4, 5, 8),
    *,
    bytes: int | None = None,
    bit_operations: float | None = None,
    method: str = "apot",
    exclude: Sequence[str] = (),
    signed: bool | None = None,
) -> Allocation:
    """Choose the bits of each layer for the least loss under a budget.

    Equation: minimise Σ_l L_l(b_l) over b_l among ``choices``, subject to Σ n_l b_l ≤ average · Σ n_l,
    Σ ceil(n_l b_l / 8) ≤ bytes, Σ m_l b_l² ≤ bit_operations, those that are given; n_l the weights and m_l the
    multiply-accumulates of layer l. L_l(b) is measured: ‖y_q − y‖² / ‖y‖² of the network's output on the calibration
    inputs with layer l alone quantized, weight and input at b bits. The optimum of the integer program, by HiGHS. First
    and last layers keep their 8 bits and count nowhere.

    Args:
        model: the float network; unchanged.
        calibration: as for ``quantize``; the first ``MOST_INPUTS`` are used.
        average: bits a weight; 3 unless another budget is given.
        choices: bits a layer may have, 2 to 8.
        bytes: of all weights of these layers, packed.
        bit_operations: of these layers, for one input.
        method, exclude, signed: as for ``quantize``.

    Returns:
        What ``quantize(model, overrides=…)`` takes, with its table.

    Raises:
        ValueError: as ``quantize``; choices or budgets out of range; a budget too small for the lowest of the choices;
            outputs without finite tensors of one shape, as a detector's boxes; no layer to choose bits for.
    """
    bits = _checked_choices(choices)
    budgets = {"average": average, "bytes": bytes, "bit_operations": bit_operations}
    if all(budget is None for budget in budgets.values()):
        budgets["average"] = average = 3.0
    for name, budget in budgets.items():
        if budget is None:
            continue
        if isinstance(budget, bool) or not isinstance(budget, Real) or not 0 < budget < float("inf"):
            raise ValueError(f"{name} {budget!r}: give a positive number")
    few = _first(read_batches(calibration))
    plan = plan_network(
        model,
        base_spec(method, bits[-1]),
        edge_bits=8,
        exclude=exclude,
        overrides=None,
        signed=signed,
        calibration=few,
    )
    names = [name for name, planned in plan.plans.items() if planned.spec.weight_scale == "threshold"]
    if not names:
        raise ValueError(
            f"{type(model).__name__} holds no layer whose bits can be chosen: all are first, last, excluded or float"
        )
    macs = _multiplications(model, plan, names)
    rows = []
    with tqdm(total=len(names) * len(bits), desc="bits of layers", unit="pass", leave=False, disable=None) as progress:
        for name in names:
            losses = {}
            for b in bits:
                losses[b] = _loss(model, plan, name, b)
                progress.update()
            weight = plan.layers[name].weight
            assert isinstance(weight, Tensor)
            rows.append(AllocatedLayer(name, bits[0], weight.numel(), macs[name], losses))
    if not any(loss for row in rows for loss in row.losses.values()):
        raise ValueError(f"{type(model).__name__}: no layer's bits change its output on these inputs: give others")
    return Allocation(tuple(_solve(rows, bits, average, bytes, bit_operations)))


def _checked_choices(choices: Sequence[int]) -> list[int]:
    bits = sorted(set(choices))
    for b in bits:
        check_bits(b, "choices:")
    if not bits or bits[-1] > 8:
        raise ValueError(f"choices {tuple(choices)}: give bits from 2 to 8")
    return bits


def _first(batches: list[Any]) -> list[Any]:
    # about MOST_INPUTS of the inputs
    *taken, last = first_batches(batches, MOST_INPUTS)
    left = MOST_INPUTS - sum(map(count_inputs, taken))
    return [*taken, last[:left] if isinstance(last, Tensor) else last]


def _multiplications(model: nn.Module, plan: NetworkPlan, names: list[str]) -> dict[str, int]:
    # multiply-accumulates of each layer for one input; inputs are counted by the first dimension of a tensor
    assert plan.batches is not None
    batch = plan.batches[0]
    one = batch[:1] if isinstance(batch, Tensor) else batch
    by_layer = {plan.layers[name]: name for name in names}
    counted = dict.fromkeys(names, 0)

    def count(layer: Any, y: Tensor) -> None:
        counted[by_layer[layer]] += y.numel() // layer.weight.shape[0] * layer.weight.numel()

    with evaluation_mode(model), watch_outputs(by_layer, count):
        run_batch(model, one)
    return counted


def _loss(model: nn.Module, plan: NetworkPlan, name: str, bits: int) -> float:
    assert plan.passes is not None
    assert plan.batches is not None
    planned = plan.plans[name]
    alone = replace(plan, plans={name: replace(planned, spec=planned.spec.with_bits(bits))})
    with unchanged(model):
        convert_planned(alone, name)
        leave_fast_paths(model)
        move_batch_norms(model, plan.passes.norms, plan.batches)
        ran, output = run_quantized(model, get_args(AnyQuantized), plan.batches)
        refuse_idle(model, alone, ran)
    error = None if output is None or plan.passes.output is None else relative_error(plan.passes.output, output)
    if error is None or not math.isfinite(error):
        raise ValueError(f"{type(model).__name__}: its output is no finite tensor of one shape, which a loss needs")
    return error**2


def _solve(
    rows: list[AllocatedLayer],
    bits: list[int],
    average: float | None,
    bytes: int | None,
    bit_operations: float | None,
) -> Iterator[AllocatedLayer]:
    """The rows at the bits of least total loss within the budgets."""
    with needed_for("the allocation of bits"):
        from scipy.optimize import Bounds, LinearConstraint, milp
    options = [[replace(row, bits=b) for b in bits] for row in rows]
    flat = [option for of_layer in options for option in of_layer]
    one_each = np.kron(np.eye(len(rows)), np.ones(len(bits)))
    constraints = [LinearConstraint(one_each, 1, 1)]
    weights = sum(row.weights for row in rows)
    budgets: dict[str, tuple[list[float], float | None]] = {
        "average": ([option.weights * option.bits / weights for option in flat], average),
        "bytes": ([option.bytes for option in flat], bytes),
        "bit_operations": ([option.bit_operations for option in flat], bit_operations),
    }
    for name, (costs, budget) in budgets.items():
        if budget is None:
            continue
        least = sum(costs[:: len(bits)])
        if least > budget * (1 + 1e-9):
            raise ValueError(f"{name} {budget:g}: {bits[0]} bits in every layer take {least:g} already")
        constraints.append(LinearConstraint(np.array(costs)[None] / budget, -np.inf, 1 + 1e-9))
    losses = np.array([option.losses[option.bits] for option in flat])
    found = milp(losses / losses.max(), integrality=np.ones(len(flat)), bounds=Bounds(0, 1), constraints=constraints)
    assert found.success, found.message
    chosen = found.x.reshape(len(rows), len(bits)).argmax(1)
    for of_layer, place in zip(options, chosen, strict=True):
        yield of_layer[place]
