"""Progressive bit-width training: each bit-width from the best of the one before, or each from the float network."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apot_fat.quant.spec import FLOAT_BITS
from apot_fat.training.build import keep_last_dataset
from apot_fat.training.config import FP32_RUN, TrainConfig
from apot_fat.training.device import choose_device
from apot_fat.training.distributed import gather_objects, launched, process_group
from apot_fat.training.folder import BEST, RunSummary, summarize
from apot_fat.training.recipe import Recipe
from apot_fat.training.resume import is_finished
from apot_fat.training.run import train

log = logging.getLogger("apot_fat")


def chain_configs(recipe: Recipe, chain: tuple[int, ...], overrides: dict[str, Any] | None = None) -> list[TrainConfig]:
    """The run of each stage of a chain, see ``train_chain``."""
    configs: list[TrainConfig] = []
    overrides = overrides or {}
    before = None
    for bits in chain:
        own = {**recipe.base, **recipe.by_bits.get(bits, {})}
        config = recipe.config(bits, {**overrides, **stage_sources(own, overrides, chain, before)})
        configs.append(config)
        before = str(Path(config.output) / config.run_name / BEST)
    return configs


def stage_sources(
    own: Mapping[str, Any], overrides: Mapping[str, Any], widths: Sequence[int], before: str | None
) -> dict[str, str]:
    """Where a stage's ``init`` and ``teacher`` come from, if not from its recipe.

    Args:
        own: the recipe's values for the stage.
        overrides: what comes over them.
        widths: bit-widths that are trained into the same folder. Of a recipe's ``fp32`` the 32-bit one is meant, or
            without one ``init``.
        before: the checkpoint of the stage before, if it starts from that.
    """
    start: str | None = overrides.get("init")
    first = before or start
    sources = {} if first is None else {"init": first}
    for name in ("init", "teacher"):
        if own.get(name) == FP32_RUN and name not in overrides.keys() - {"init"}:
            sources[name] = FP32_RUN if FLOAT_BITS in widths else start or FP32_RUN
    return sources


def train_chain(recipe: Recipe, chain: tuple[int, ...], overrides: dict[str, Any] | None = None) -> list[RunSummary]:
    """Train a recipe's chain of bit-widths.

    A stage whose run folder holds all of its epochs is skipped; an unfinished one goes on where it stopped.

    Args:
        recipe: the recipe.
        chain: bit-widths in order, such as (32, 4, 3, 2). Each starts from the one before it, unless the recipe's
            ``init`` is ``fp32``: that, and a ``teacher`` ``fp32``, is the chain's 32-bit run, or without one where it
            starts.
        overrides: config values over the recipe's; ``init`` is where the first stage starts.

    Returns:
        One summary a stage.

    Raises:
        ValueError: anything that does not fit; every stage's config is checked before the first begins.
    """
    if not chain:
        raise ValueError("chain (): expected bit-widths in order, such as (32, 4, 3, 2)")
    configs = chain_configs(recipe, chain, overrides)
    processes = launched()
    device = choose_device(configs[0].device, configs[0].gpu, processes.local_rank)
    summaries = []
    with process_group(processes, device, configs[0].dist_timeout):
        done = gather_objects([is_finished(config) for config in configs])[0]  # what the first process finds
        images = keep_last_dataset()
        for config, finished in zip(configs, done, strict=True):
            folder = Path(config.output) / config.run_name
            if finished:
                log.info("%s: finished before, skipped", folder)
                summaries.append(summarize(folder))
            else:
                summaries.append(train(config, resume="auto", dataset=images(config)))
    return summaries
