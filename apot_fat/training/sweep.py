"""Sweeps: recipes × methods × bit-widths × seeds, described by one TOML file, resumable run by run."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from apot_fat.quant.spec import PRESETS, check_bits, nearest
from apot_fat.training.build import keep_last_dataset
from apot_fat.training.config import TrainConfig
from apot_fat.training.device import choose_device
from apot_fat.training.distributed import gather_objects, launched, process_group
from apot_fat.training.finite import NonFiniteError
from apot_fat.training.folder import BEST, RunSummary, summarize
from apot_fat.training.progressive import stage_sources
from apot_fat.training.recipe import PUBLISHED, config_path, find_recipe, read_recipe, read_toml
from apot_fat.training.results import ResultRow
from apot_fat.training.resume import is_finished
from apot_fat.training.run import train

log = logging.getLogger("apot_fat")

Table = dict[str, Any]

_OWN = ("preset", "bit", "seed", "output")  # of each cell


class Cell(NamedTuple):
    """One run of a sweep."""

    recipe: str
    method: str
    bits: int
    seed: int

    def __str__(self) -> str:
        return f"{self.recipe} {self.method} {self.bits} bits seed {self.seed}"


@dataclass(frozen=True)
class Sweep:
    """A sweep file.

    Values come in this order, the later over the earlier: the recipe file that a recipe names with ``config``
    (``published`` or ``ours``, a name of ``list_recipes`` or a path), ``[base]``, ``[bits.N]``, ``[methods.NAME]``,
    ``[recipes.NAME]``, ``[recipes.NAME.bits.N]``, the command line.

    Args:
        path: where it was read from.
        content: the file's tables.
        methods: bit-widths by method, in order, by recipe.
        seeds: of every cell.
        chain: whether each bit-width starts from the best of the one before of the same recipe, method and seed, the
            first from ``init``; else, and where ``init`` is ``fp32``, all start from ``init``.
        baseline: the recipe that the others are compared with.
    """

    path: Path
    content: Table
    methods: dict[str, dict[str, list[int]]]
    seeds: list[int]
    chain: bool
    baseline: str

    @cached_property
    def cells(self) -> list[Cell]:
        """Every run, seed by seed: an interrupted sweep has whole rows of few seeds rather than few rows."""
        return [
            Cell(recipe, method, bits, seed)
            for seed in self.seeds
            for recipe, methods in self.methods.items()
            for method, widths in methods.items()
            for bits in widths
        ]

    def config(self, cell: Cell, overrides: dict[str, Any]) -> TrainConfig:
        """The run of a cell, in a folder of its own under ``overrides["output"]``.

        Raises:
            ValueError: an unknown key or bad value, naming file and recipe; no such recipe under ``configs/``.
        """
        where = f"sweep {self.path}: {cell}"
        recipe = {key: value for key, value in self.content["recipes"][cell.recipe].items() if key != "methods"}
        own_bits, source = recipe.pop("bits", {}), recipe.pop("config", None)
        by_bits, by_method = self.content.get("bits", {}), self.content.get("methods", {})
        bits = str(cell.bits)
        layers = (self.content.get("base", {}), by_bits.get(bits, {}), by_method.get(cell.method, {}), recipe)
        values = {key: value for layer in (*layers, own_bits.get(bits, {})) for key, value in layer.items()}
        named = {**values, **overrides}
        arch, data = named.get("arch", TrainConfig.arch), named.get("data", TrainConfig.data)
        if source is not None:
            found = read_recipe(source) if "/" in source else find_recipe(data, arch, cell.method, source)
            if found is None:
                raise ValueError(f"{where}: no recipe {source!r} for {arch} on {data} under configs/")
            values = {**found.base, **found.by_bits.get(cell.bits, {}), **values}
            arch = overrides.get("arch") or values.get("arch", arch)
        output = Path(overrides["output"]) / cell.recipe / cell.method / f"seed{cell.seed}"
        widths, before = self.methods[cell.recipe][cell.method], None
        if self.chain and (place := widths.index(cell.bits)):
            before = str(output / f"{arch}_{widths[place - 1]}bit" / BEST)
        values |= overrides | stage_sources(values, overrides, widths, before)
        values |= {"preset": cell.method, "bit": cell.bits, "seed": cell.seed, "output": str(output)}
        return TrainConfig.from_dict(values, where)


def read_sweep(source: str | os.PathLike[str]) -> Sweep:
    """Read a sweep file and check its names; the cells' values are checked with their ``config``.

    Args:
        source: its path, or the name of a packaged one, such as ``sweeps/cifar10_full``.

    Raises:
        ValueError: no such file, no TOML, an unknown key (with the nearest known one), or a bad value of the grid.
    """
    path = config_path(source)
    where = f"sweep {path}"
    content = read_toml(path)
    _known(content, ("sweep", "base", "bits", "methods", "recipes"), where)
    grid, recipes = _table(content, "sweep", where), _table(content, "recipes", where)
    _known(grid, ("methods", "seeds", "chain", "baseline"), f"{where}: [sweep]")
    _check_fields(_table(content, "base", where), f"{where}: [base]")
    _check_bits(content, where)
    for name, values in _table(content, "methods", where).items():
        _check_method(name, f"{where}: [methods.{name}]")
        _check_fields(values, f"{where}: [methods.{name}]")
    if not recipes:
        raise ValueError(f"{where}: no recipe: add tables such as [recipes.published]")
    methods = {}
    for name in recipes:
        place = f"{where}: [recipes.{name}]"
        if not re.fullmatch(r"\w[\w.+-]*", name, re.ASCII):
            raise ValueError(f"{where}: recipe {name!r} names a folder: choose letters, digits and any of . _ + -")
        recipe = _table(recipes, name, f"{where}: recipes")
        _check_bits(recipe, place)
        _check_fields({k: v for k, v in recipe.items() if k not in ("methods", "bits", "config")}, place)
        methods[name] = _methods(recipe if "methods" in recipe else grid, place)
        if not isinstance(recipe.get("config", ""), str):
            raise ValueError(f"{place}: config {recipe['config']!r}: expected the name of a recipe, such as ours")
    seeds, baseline, chain = grid.get("seeds", [0]), grid.get("baseline", PUBLISHED), grid.get("chain", False)
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ValueError(f"{where}: seeds {seeds!r}: expected a list of integers from 0 up")
    if not isinstance(chain, bool):
        raise ValueError(f"{where}: chain {chain!r}: expected true or false")
    if not isinstance(baseline, str) or baseline not in recipes:
        raise ValueError(f"{where}: baseline {baseline!r}: choose one of {', '.join(recipes)}")
    return Sweep(path, content, methods, seeds, chain, baseline)


def run_sweep(
    sweep: Sweep,
    overrides: dict[str, Any],
    *,
    wanted: Callable[[Cell], bool] = lambda cell: True,
    after_cell: Callable[[Cell, RunSummary, list[ResultRow]], None],
) -> tuple[list[ResultRow], dict[Cell, str]]:
    """Run the cells of a sweep that are not finished yet, an unfinished one from where it stopped.

    A cell whose gradient becomes infinite or NaN fails, and so do those that would start from it or learn from it; the
    others run. Under torchrun all processes train each run together. Several sweeps may work on different cells of one
    folder.

    Args:
        sweep: the sweep.
        overrides: config values of the command line; ``output`` is the folder of all cells.
        wanted: which cells to run.
        after_cell: called after each run, with the rows of all finished cells.

    Returns:
        The rows of all finished cells, in the sweep's order; and why a cell that was to run has not finished.

    Raises:
        ValueError: anything that does not fit; every cell's config is checked before the first begins.
        InterruptedRunError: SIGINT or SIGTERM came; the run under way was saved.
    """
    configs = {cell: sweep.config(cell, overrides) for cell in sweep.cells}
    first = next(iter(configs.values()))
    processes = launched()
    device = choose_device(first.device, first.gpu, processes.local_rank)
    found: dict[Cell, ResultRow] = {}
    failed: dict[Cell, str] = {}
    images = keep_last_dataset()
    with process_group(processes, device, first.dist_timeout):
        _update(found, configs)
        finished = gather_objects(set(found))[0]  # another sweep may finish a cell while the processes look
        due = [cell for cell in configs if wanted(cell) and cell not in finished]
        for cell in due:
            if missing := [parent for parent in _parents(cell, configs) if parent not in (*finished, *due)]:
                raise ValueError(f"{cell}: starts from {missing[0]}, which is not finished; run that too")
        bar = tqdm(due, desc="sweep", unit="run", disable=None if processes.is_first else True)
        for cell in bar:
            bar.set_postfix_str(str(cell))
            if missing := [parent for parent in _parents(cell, configs) if parent in failed]:
                failed[cell] = f"skipped, as it builds on {missing[0]}"
                log.error("%s: %s", cell, failed[cell])
                continue
            try:
                summary = train(configs[cell], resume="auto", dataset=images(configs[cell]))
            except NonFiniteError as error:
                log.error("%s: %s", cell, error)
                failed[cell] = "did not stay finite"
                continue
            after_cell(cell, summary, _update(found, configs))
    return _update(found, configs), failed


def _parents(cell: Cell, configs: dict[Cell, TrainConfig]) -> list[Cell]:
    # the cells whose best checkpoint it starts from or learns from
    config = configs[cell]
    paths = map(config.weights_path, (config.init, config.teacher))
    places = {Path(path).parent for path in paths if path is not None}
    return [other for other, theirs in configs.items() if Path(theirs.output) / theirs.run_name in places]


def _update(found: dict[Cell, ResultRow], configs: dict[Cell, TrainConfig]) -> list[ResultRow]:
    # add the rows of cells that have finished since; all rows in order
    for cell, config in configs.items():
        if cell not in found and is_finished(config):
            run = summarize(Path(config.output) / config.run_name)
            found[cell] = ResultRow(*cell, run.epochs, run.last, run.best, run.last_val, run.seconds)
    return [found[cell] for cell in configs if cell in found]


def _table(content: Table, name: str, where: str) -> Table:
    table = content.get(name, {})
    if not isinstance(table, dict):
        raise ValueError(f"{where}: {name} {table!r}: expected a table of values")
    return table


def _check_bits(content: Table, where: str) -> None:
    for key, values in _table(content, "bits", where).items():
        if not key.isdigit():
            raise ValueError(f"{where}: [bits.{key}]: expected a bit-width, such as [bits.4]")
        check_bits(int(key), f"{where}: [bits.{key}]")
        _check_fields(values, f"{where}: [bits.{key}]")


def _check_fields(values: Any, where: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a table of values")
    known = {option.name for option in fields(TrainConfig)} - set(_OWN)
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(key, known)}")


def _known(table: Table, known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(key, known)}: choose of {', '.join(known)}")


def _check_method(name: str, where: str) -> None:
    if name not in PRESETS:
        raise ValueError(f"{where}: method {name!r}{nearest(name, PRESETS)}: choose one of {', '.join(PRESETS)}")


def _methods(table: Table, where: str) -> dict[str, list[int]]:
    methods = table.get("methods")
    if not methods or not isinstance(methods, dict) or not all(isinstance(bits, list) for bits in methods.values()):
        raise ValueError(f'{where}: methods {methods!r}: expected bit-widths by method, such as {{"apot-cifar" = [4]}}')
    for name, widths in methods.items():
        _check_method(name, where)
        if not widths:
            raise ValueError(f"{where}: {name} []: expected bit-widths, such as [4, 3, 2]")
        for bits in widths:
            check_bits(bits, f"{where}: {name}")
    return {name: list(dict.fromkeys(widths)) for name, widths in methods.items()}
