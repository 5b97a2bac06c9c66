"""Sweeps: recipes × methods × bit-widths × seeds, described by one TOML file, resumable run by run."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from apot_fat.data import Dataset
from apot_fat.quant.spec import PRESETS, check_bits, nearest
from apot_fat.training.build import load_config_dataset
from apot_fat.training.config import TrainConfig
from apot_fat.training.device import choose_device
from apot_fat.training.distributed import gather_objects, launched, process_group
from apot_fat.training.finite import NonFiniteError
from apot_fat.training.folder import BEST, RunSummary, summarize
from apot_fat.training.recipe import PUBLISHED, find_recipe, read_toml
from apot_fat.training.results import ResultRow
from apot_fat.training.resume import is_finished
from apot_fat.training.run import train
from apot_fat.training.teacher import teacher_path

log = logging.getLogger("apot_fat")

_DATA_FIELDS = ("data", "test_data", "data_root", "image_size", "val_split", "loader", "on_damaged")
_GRID = ("methods", "seeds", "chain", "baseline")


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    recipe: str
    method: str
    bits: int
    seed: int

    def __str__(self) -> str:
        return f"{self.recipe} {self.method} {self.bits} bits seed {self.seed}"


@dataclass(frozen=True)
class SweepRecipe:
    """A recipe of a sweep: what it changes of the base.

    Args:
        values: fields of ``TrainConfig``.
        by_bits: values for one bit-width, over those (``[recipes.NAME.bits.2]``).
        methods: bit-widths by method, in order; by default the sweep's.
        config: name of the recipe under ``configs/`` whose values come first, ``published`` or ``ours``; or None.
    """

    values: dict[str, Any]
    by_bits: dict[int, dict[str, Any]]
    methods: dict[str, tuple[int, ...]]
    config: str | None


@dataclass(frozen=True)
class Sweep:
    """A sweep file.

    Values come in this order, the later over the earlier: the recipe file of ``config``, ``[base]``, ``[bits.N]``,
    ``[methods.NAME]``, ``[recipes.NAME]``, ``[recipes.NAME.bits.N]``, the command line.

    Args:
        path: where it was read from.
        seeds: of every cell.
        chain: whether each bit-width starts from the best of the one before of the same recipe, method and seed, the
            first from ``init``; else all start from ``init``.
        baseline: the recipe that the others are compared with.
        base: values for every cell.
        by_bits, by_method: values for one bit-width, for one method.
        recipes: by name.
    """

    path: Path
    seeds: tuple[int, ...]
    chain: bool
    baseline: str
    base: dict[str, Any]
    by_bits: dict[int, dict[str, Any]]
    by_method: dict[str, dict[str, Any]]
    recipes: dict[str, SweepRecipe]

    def cells(self) -> list[Cell]:
        """Every run, seed by seed: an interrupted sweep has whole rows of few seeds rather than few rows."""
        return [
            Cell(name, method, bits, seed)
            for seed in self.seeds
            for name, recipe in self.recipes.items()
            for method, widths in recipe.methods.items()
            for bits in widths
        ]

    def config(self, cell: Cell, overrides: dict[str, Any]) -> TrainConfig:
        """The run of a cell, in a folder of its own under ``overrides["output"]``.

        Raises:
            ValueError: an unknown key or bad value, naming file and recipe; no such recipe under ``configs/``.
        """
        recipe, where = self.recipes[cell.recipe], f"sweep {self.path}: {cell}"
        values = {**self.base, **self.by_bits.get(cell.bits, {}), **self.by_method.get(cell.method, {})}
        values |= {**recipe.values, **recipe.by_bits.get(cell.bits, {}), **overrides}
        values |= {"preset": cell.method, "bit": cell.bits, "seed": cell.seed}
        output = Path(overrides["output"]) / cell.recipe / cell.method / f"seed{cell.seed}"
        values["output"] = str(output)
        if recipe.config is not None:
            arch, data = values.get("arch", TrainConfig.arch), values.get("data", TrainConfig.data)
            source = find_recipe(data, arch, cell.method, recipe.config)
            if source is None:
                raise ValueError(f"{where}: no recipe {recipe.config!r} for {arch} on {data} under configs/")
            values = {**source.base, **source.by_bits.get(cell.bits, {}), **values}
        config = TrainConfig.from_dict(values, where)
        widths = recipe.methods[cell.method]
        if self.chain and (place := widths.index(cell.bits)):
            before = str(output / f"{config.arch}_{widths[place - 1]}bit" / BEST)
            config = TrainConfig.from_dict({**config.to_dict(), "init": before}, where)
        return config


def read_sweep(path: str | os.PathLike[str]) -> Sweep:
    """Read a sweep file and check its names; the cells' values are checked with their ``config``.

    Raises:
        ValueError: no such file, no TOML, an unknown key (with the nearest known one), or a bad value of the grid.
    """
    path, content = Path(path), read_toml(path)
    _known(content, ("sweep", "base", "bits", "methods", "recipes"), f"sweep {path}")
    grid, recipes = _table(content, "sweep", path), _table(content, "recipes", path)
    _known(grid, _GRID, f"sweep {path}: [sweep]")
    if not recipes:
        raise ValueError(f"sweep {path}: no recipe: add tables such as [recipes.published]")
    methods = _methods(grid.get("methods"), f"sweep {path}: methods") if "methods" in grid else {}
    read = {}
    for name, table in recipes.items():
        where = f"sweep {path}: [recipes.{name}]"
        if not re.fullmatch(r"\w[\w.+-]*", name, re.ASCII):
            raise ValueError(f"sweep {path}: recipe {name!r} names a folder: choose letters, digits and any of . _ + -")
        if not isinstance(table, dict):
            raise ValueError(f"{where}: expected a table of values")
        values = dict(table)
        by_bits = _by_bits(values.pop("bits", {}), where)
        own_methods = _methods(values.pop("methods"), where) if "methods" in values else methods
        if not own_methods:
            raise ValueError(f'{where}: no methods: name them in [sweep], such as methods = {{"apot-cifar" = [4, 3]}}')
        config = values.pop("config", None)
        if config is not None and not isinstance(config, str):
            raise ValueError(f"{where}: config {config!r}: expected the name of a recipe, published or ours")
        _check_fields(values, where)
        read[name] = SweepRecipe(values, by_bits, own_methods, config)
    seeds, baseline, chain = grid.get("seeds", [0]), grid.get("baseline", PUBLISHED), grid.get("chain", False)
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ValueError(f"sweep {path}: seeds {seeds!r}: expected a list of integers from 0 up")
    if not isinstance(chain, bool):
        raise ValueError(f"sweep {path}: chain {chain!r}: expected true or false")
    if not isinstance(baseline, str) or baseline not in read:
        raise ValueError(f"sweep {path}: baseline {baseline!r}: choose one of {', '.join(read)}")
    base, by_method = _table(content, "base", path), _table(content, "methods", path)
    _check_fields(base, f"sweep {path}: [base]")
    for name, values in by_method.items():
        _check_method(name, f"sweep {path}: [methods.{name}]")
        _check_fields(values, f"sweep {path}: [methods.{name}]")
    by_bits = _by_bits(content.get("bits", {}), f"sweep {path}")
    return Sweep(path, tuple(seeds), chain, baseline, base, by_bits, by_method, read)


class SweepResults(NamedTuple):
    """What stands in a sweep's folder.

    Args:
        rows: of all finished cells, in the sweep's order.
        failed: why a cell that was to run has not finished.
    """

    rows: list[ResultRow]
    failed: dict[Cell, str]


def run_sweep(
    sweep: Sweep,
    overrides: dict[str, Any],
    *,
    wanted: Callable[[Cell], bool] = lambda cell: True,
    after_cell: Callable[[Cell, RunSummary, list[ResultRow]], None],
) -> SweepResults:
    """Run the cells of a sweep that are not finished yet, an unfinished one from where it stopped.

    A cell whose gradient becomes infinite or NaN fails, and so do those that would start from it or learn from it; the
    others run. Under torchrun all processes train each run together. Several sweeps may work on different cells of one
    folder.

    Args:
        sweep: the sweep.
        overrides: config values of the command line; ``output`` is the folder of all cells.
        wanted: which cells to run.
        after_cell: called after each run, with the rows of all finished cells.

    Raises:
        ValueError: anything that does not fit; every cell's config is checked before the first begins.
        InterruptedRunError: SIGINT or SIGTERM came; the run under way was saved.
    """
    configs = {cell: sweep.config(cell, overrides) for cell in sweep.cells()}
    first = next(iter(configs.values()))
    processes = launched()
    device = choose_device(first.device, first.gpu, processes.local_rank)
    rows, datasets = _Rows(configs), _Datasets()
    failed: dict[Cell, str] = {}
    with process_group(processes, device, first.dist_timeout):
        finished = rows.finished()
        due = [cell for cell in configs if wanted(cell) and cell not in finished]
        for cell in due:
            if missing := [parent for parent in _parents(cell, configs) if parent not in (*finished, *due)]:
                raise ValueError(f"{cell}: starts from {missing[0]}, which is not finished; run that too")
        for cell in _bar(due, show=processes.is_first):
            config = configs[cell]
            if missing := [parent for parent in _parents(cell, configs) if parent in failed]:
                failed[cell] = f"skipped, as it builds on {missing[0]}"
                log.error("%s: %s", cell, failed[cell])
                continue
            try:
                summary = train(config, resume="auto", dataset=datasets.get(config))
            except NonFiniteError as error:
                log.error("%s: %s", cell, error)
                failed[cell] = "did not stay finite"
                continue
            after_cell(cell, summary, rows.sorted())
    return SweepResults(rows.sorted(), failed)


def _parents(cell: Cell, configs: dict[Cell, TrainConfig]) -> list[Cell]:
    # the cells whose best checkpoint it starts from or learns from
    config = configs[cell]
    taught = teacher_path(config, BEST) if config.teacher else None
    places = {Path(path).parent for path in (config.init, taught) if path is not None}
    return [other for other, theirs in configs.items() if Path(theirs.output) / theirs.run_name in places]


class _Rows:
    """The rows of the finished cells of an output folder."""

    def __init__(self, configs: dict[Cell, TrainConfig]) -> None:
        self.configs = configs
        self.found: dict[Cell, ResultRow] = {}

    def finished(self) -> set[Cell]:
        """What the first process finds finished: another sweep may finish a cell while they look."""
        return gather_objects(set(self._update()))[0]

    def sorted(self) -> list[ResultRow]:
        found = self._update()
        return [found[cell] for cell in self.configs if cell in found]

    def _update(self) -> dict[Cell, ResultRow]:
        for cell, config in self.configs.items():
            if cell not in self.found and is_finished(config):
                self.found[cell] = _row(cell, summarize(Path(config.output) / config.run_name))
        return self.found


class _Datasets:
    """The images of the last config; many runs in a row have the same."""

    def __init__(self) -> None:
        self.key: tuple[Any, ...] | None = None
        self.dataset: Dataset | None = None

    def get(self, config: TrainConfig) -> Dataset:
        # the seed chooses the held-out images
        key = (*(getattr(config, name) for name in _DATA_FIELDS), config.streams, config.val_split and config.seed)
        if self.dataset is None or key != self.key:
            self.key, self.dataset = key, load_config_dataset(config)
        return self.dataset


def _row(cell: Cell, run: RunSummary) -> ResultRow:
    return ResultRow(
        cell.recipe, cell.method, cell.bits, cell.seed, run.epochs, run.last, run.best, run.last_val, run.seconds
    )


def _bar(cells: Sequence[Cell], *, show: bool) -> Iterator[Cell]:
    with tqdm(total=len(cells), desc="sweep", unit="run", disable=None if show else True) as bar:
        for cell in cells:
            bar.set_postfix_str(str(cell))
            yield cell
            bar.update()


def _table(content: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    table = content.get(name, {})
    if not isinstance(table, dict):
        raise ValueError(f"sweep {path}: {name} {table!r}: expected a table [{name}]")
    return table


def _known(table: dict[str, Any], known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(key, known)}: choose of {', '.join(known)}")


def _check_fields(values: Any, where: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a table of values")
    known = {option.name for option in fields(TrainConfig)} - {"preset", "bit", "seed", "output"}
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(key, known)}")


def _check_method(name: str, where: str) -> None:
    if name not in PRESETS:
        raise ValueError(f"{where}: method {name!r}{nearest(name, PRESETS)}: choose one of {', '.join(PRESETS)}")


def _methods(methods: Any, where: str) -> dict[str, tuple[int, ...]]:
    if not isinstance(methods, dict) or not all(isinstance(widths, list) for widths in methods.values()):
        raise ValueError(f'{where}: methods {methods!r}: expected bit-widths by method, such as {{"apot-cifar" = [4]}}')
    for name, widths in methods.items():
        _check_method(name, where)
        for bits in widths:
            check_bits(bits, f"{where}: {name}")
    return {name: tuple(dict.fromkeys(widths)) for name, widths in methods.items()}


def _by_bits(tables: Any, where: str) -> dict[int, dict[str, Any]]:
    if not isinstance(tables, dict):
        raise ValueError(f"{where}: bits {tables!r}: expected tables such as [bits.4]")
    by_bits = {}
    for key, values in tables.items():
        if not key.isdigit():
            raise ValueError(f"{where}: [bits.{key}]: expected a bit-width, such as [bits.4]")
        check_bits(int(key), f"{where}: [bits.{key}]")
        _check_fields(values, f"{where}: [bits.{key}]")
        by_bits[int(key)] = values
    return by_bits
