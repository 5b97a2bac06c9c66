"""What a run goes on from, and whether that is the same run: its config, and what it reads, known by its content."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

from apot_fat.checkpoint import (
    TORCHVISION,
    atomic_write,
    before,
    checksum,
    file_checksum,
    read_checkpoint,
    read_newest,
    state_dict_of,
)
from apot_fat.data import Dataset
from apot_fat.training.build import load_config_dataset
from apot_fat.training.config import TrainConfig
from apot_fat.training.folder import BEST, LAST, METRICS, best_index, run_config

_PLACES = {"data": ("data", "test_data"), "init": ("init",), "teacher": ("teacher",)}  # fields that say where it lies
_FIELDS = {option.name for option in fields(TrainConfig)}
_FREE_TO_CHANGE = {"output", "device", "gpu", "print_freq", "histogram_every", "test_batch_size", "data_root"}
_FREE_TO_CHANGE |= {"epochs", "workers", "dist_timeout", "on_damaged", "compile", "skip_nonfinite", "checkpoint_every"}
_FREE_TO_CHANGE |= {"mean", "std"}  # given or not: what counts is what is used
_FREE_TO_CHANGE |= {place for places in _PLACES.values() for place in places}

log = logging.getLogger("apot_fat")


def resumed_content(config: TrainConfig, resume: str | None) -> dict[str, Any] | None:
    """The checkpoint that a run goes on from; None where it starts.

    Args:
        config: the run.
        resume: as in ``train``.

    Raises:
        ValueError: a run in the folder already and no ``resume``, a damaged checkpoint, or one of another config.
    """
    folder = Path(config.output) / config.run_name
    last = folder / LAST
    is_there = last.exists() or before(last).exists()
    if not is_there:
        _check_no_stranger(folder, config)
    if resume is None:
        if is_there:
            raise ValueError(f"{folder} holds a run already: go on with --resume auto, or name another --output")
        return None
    path = last if resume == "auto" else Path(resume)
    if resume == "auto" and not is_there:
        return None
    content = read_newest(path, log.warning)
    _check_config(content, path, config)
    if is_there and path.resolve() != last.resolve():
        _check_is_behind(last, content, path, config)
    if unknown := [f"{name} = {value}" for name, value in content["config"].items() if name not in _FIELDS]:
        log.warning("checkpoint %s: was run with %s, which this version has not", path, ", ".join(unknown))
    epochs = run_config(content, path).epochs
    if epochs != config.epochs and config.schedule != "step":
        where = f"checkpoint {path}: was run with epochs = {epochs}, which its {config.schedule} schedule depends on"
        if len(content["history"]) < epochs:
            raise ValueError(f"{where}, not {config.epochs}: finish it first, or name another --output")
        log.warning("%s: goes on as one of %d would from here, which is not a run of as many", where, config.epochs)
    return content


def _check_no_stranger(folder: Path, config: TrainConfig) -> None:
    # of a run without its last checkpoint only what one leaves that is killed in its first epoch may be there
    metrics, best = folder / METRICS, folder / BEST
    if metrics.exists() and metrics.read_bytes().count(b"\n") > 1:
        raise ValueError(f"{metrics}: the metrics of a run whose {LAST} is gone; move them, or name another --output")
    if best.exists():
        try:
            content = read_checkpoint(best)
            _check_config(content, best, config)
        except ValueError as error:
            raise ValueError(f"{best}: of no run in this folder; move it, or name another --output") from error
        if (epochs := len(content["history"])) > 1:
            raise ValueError(f"{best}: epoch {epochs} of a run whose {LAST} is gone; move it, or name another --output")


def _check_is_behind(last: Path, content: dict[str, Any], path: Path, config: TrainConfig) -> None:
    # what lies in the folder already must be an earlier epoch of the run that comes into it
    there = read_newest(last, log.warning)
    _check_config(there, last, config)
    mine, theirs = content["history"], there["history"]
    if theirs != mine[: len(theirs)]:
        raise ValueError(
            f"{last.parent}: holds {len(theirs)} epochs of a run that {path}, with {len(mine)}, does not go on; "
            "move them, or name another --output"
        )


def _check_config(content: dict[str, Any], path: Path, config: TrainConfig) -> None:
    recorded = run_config(content, path)
    normalization = recorded.normalization(), config.normalized_as(recorded).normalization()
    for name, *values in zip(("mean", "std"), *normalization, strict=True):
        if values[0] != values[1]:
            raise ValueError(_changed(path, name, *map(list, values)))
    then, now = recorded.to_dict(), config.to_dict()
    for name in sorted({*then, *now} - _FREE_TO_CHANGE):
        if then.get(name) != now.get(name):
            raise ValueError(_changed(path, name, then.get(name), now.get(name)))


def keep_best(folder: Path, resume: str | None, history: list[dict[str, Any]]) -> None:
    """Bring the best checkpoint along where a run goes on in another folder; say so where it is gone."""
    if not history or (folder / BEST).exists():
        return
    best = best_index(history) + 1
    beside = folder / BEST if resume in (None, "auto") else Path(str(resume)).parent / BEST
    if beside.is_file() and read_checkpoint(beside).get("history") == history[:best]:
        with atomic_write(folder / BEST) as temporary:
            shutil.copyfile(beside, temporary)
    else:
        log.warning(
            "%s: that of epoch %d, the best so far, is gone; a later one replaces it if it is better",
            folder / BEST,
            best,
        )


def resumed_config(path: Path, given: dict[str, Any]) -> TrainConfig:
    """The config of the run that wrote a checkpoint, in the folder where it lies now, and what is given over it.

    Raises:
        ValueError: no checkpoint of a run, or a bad value.
    """
    config = run_config(read_newest(path, log.warning), path)
    folder = path.resolve().parent
    output = {"output": str(folder.parent)} if folder.name == config.run_name else {}
    return TrainConfig.from_dict(config.to_dict() | output | given, f"checkpoint {path}")


def is_finished(config: TrainConfig) -> bool:
    """Whether the config's run folder holds all of its epochs.

    Raises:
        ValueError: a damaged checkpoint, or one of another config, or of other images, start or teacher.
    """
    content = resumed_content(config, "auto")
    if content is None or len(content["history"]) < config.epochs:
        return False
    moved = _moved(run_config(content, Path(config.output)), config)
    dataset = load_config_dataset(config) if "data" in moved else None
    checked_sources(content, config, dataset, moved)
    return True


def checked_sources(
    content: dict[str, Any] | None,
    config: TrainConfig,
    dataset: Dataset | None,
    names: Collection[str] = _PLACES.keys(),
) -> dict[str, str]:
    """What a run reads: SHA-256 of its images, and of the weights of ``init`` and ``teacher`` where they are there.

    Args:
        content: the checkpoint that it goes on from; None at its start.
        config: the run.
        dataset: its images; None leaves them out.
        names: what to look at, of ``data``, ``init`` and ``teacher``.

    Raises:
        ValueError: other images, or another teacher, than the run began with; or another start at another place.
    """
    files = {name: config.weights_path(getattr(config, name)) for name in ("init", "teacher")}
    now = {} if dataset is None else {"data": dataset.checksum}
    for name, path in files.items():
        if path not in (None, TORCHVISION) and Path(path).is_file() and name in names:
            now[name] = _network_checksum(path)
    if content is None:
        return now
    recorded: dict[str, str] = content.get("sources", {})
    run = Path(config.output) / config.run_name
    then = run_config(content, run)
    moved = _moved(then, config)
    for name, place in moved.items():
        if name not in recorded or name not in now:  # a checkpoint of an older version, or a file that is gone
            raise ValueError(_changed(run, place, getattr(then, place), getattr(config, place)))
    for name in recorded.keys() & now.keys():
        if recorded[name] == now[name]:
            continue
        place = moved.get(name, name)
        if name == "init" and name not in moved:  # the run has long left it
            log.warning("%s is not what it was when %s started from it", config.init, run)
        else:
            raise ValueError(
                f"{run}: {place} {getattr(config, place)!r} does not hold what the run began with; "
                "give that, or name another --output"
            )
    return now | recorded


def _network_checksum(path: str) -> str:
    # of the weights: a stage of a chain that is trained again to the same bits took other seconds
    try:
        return checksum(state_dict_of(read_checkpoint(path)))
    except ValueError:  # a packed file, or a damaged one
        return file_checksum(path)


def _moved(then: TrainConfig, now: TrainConfig) -> dict[str, str]:
    # what lies elsewhere than before, and the field that says so
    fields = [(name, place) for name, places in _PLACES.items() for place in places]
    return {name: place for name, place in fields if getattr(then, place) != getattr(now, place)}


def _changed(where: Path, name: str, then: Any, now: Any) -> str:
    return f"{where}: was run with {name} = {then!r}, not {now!r}; give that value, or name another --output"
