"""What a run goes on from, and whether that is the same run: its config, and what it reads, known by its content."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from apot_fat.checkpoint import TORCHVISION, file_checksum, read_newest
from apot_fat.data import Dataset
from apot_fat.training.build import load_config_dataset
from apot_fat.training.config import TrainConfig
from apot_fat.training.folder import BEST, LAST, run_config
from apot_fat.training.teacher import teacher_path

_PLACES = {"data": ("data", "test_data"), "init": ("init",), "teacher": ("teacher",)}  # fields that say where it lies
_FREE_TO_CHANGE = {"output", "device", "gpu", "print_freq", "histogram_every", "test_batch_size", "data_root"}
_FREE_TO_CHANGE |= {"epochs", "workers", "dist_timeout", "on_damaged", "compile", "skip_nonfinite", "checkpoint_every"}
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
    if resume is None:
        if last.exists():
            raise ValueError(f"{folder} holds a run already: go on with --resume auto, or name another --output")
        return None
    path = last if resume == "auto" else Path(resume)
    if resume == "auto" and not path.exists():
        return None
    content = read_newest(path, log.warning)
    before = run_config(content, path).to_dict()
    now = config.to_dict()
    for name in sorted({*before, *now} - _FREE_TO_CHANGE):
        if before.get(name) != now.get(name):
            raise ValueError(_changed(path, name, before.get(name), now.get(name)))
    if before.get("epochs") != now.get("epochs") and (config.schedule != "step" or config.freeze_weights_from < 1):
        what = f"{config.schedule} schedule" if config.schedule != "step" else "freeze_weights_from"
        raise ValueError(
            f"checkpoint {path}: was run with epochs = {before['epochs']}, which its {what} depends on, "
            f"not {config.epochs}"
        )
    return content


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
    """What a run reads: SHA-256 of its images, and of the checkpoints of ``init`` and ``teacher`` where they are there.

    Args:
        content: the checkpoint that it goes on from; None at its start.
        config: the run.
        dataset: its images; None leaves them out.
        names: what to look at, of ``data``, ``init`` and ``teacher``.

    Raises:
        ValueError: other images, or another teacher, than the run began with; or another start at another place.
    """
    files = {"init": config.init, "teacher": config.teacher and teacher_path(config, BEST)}
    now = {} if dataset is None else {"data": dataset.checksum}
    for name, path in files.items():
        if path not in (None, "none", TORCHVISION) and Path(path).is_file() and name in names:
            now[name] = file_checksum(path)
    if content is None:
        return now
    recorded: dict[str, str] = content.get("sources", {})
    run = Path(config.output) / config.run_name
    before = run_config(content, run)
    moved = _moved(before, config)
    for name, place in moved.items():
        if name not in recorded or name not in now:  # a checkpoint of before, or a file that is gone
            raise ValueError(_changed(run, place, getattr(before, place), getattr(config, place)))
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


def _moved(before: TrainConfig, now: TrainConfig) -> dict[str, str]:
    # what lies elsewhere than before, and the field that says so
    fields = [(name, place) for name, places in _PLACES.items() for place in places]
    return {name: place for name, place in fields if getattr(before, place) != getattr(now, place)}


def _changed(where: Path, name: str, before: Any, now: Any) -> str:
    return f"{where}: was run with {name} = {before!r}, not {now!r}; give that value, or name another --output"
