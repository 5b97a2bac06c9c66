"""The page of runs and checkpoints in one call; what ``apot-fat report`` does."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from apot_fat.checkpoint import atomic_write, output_file
from apot_fat.quant.measure import weight_layers
from apot_fat.reporting import charts
from apot_fat.reporting.contents import Report, build_report
from apot_fat.reporting.page import page
from apot_fat.reporting.subject import load_subjects

log = logging.getLogger("apot_fat")

AnyPath = str | os.PathLike[str]


def report(
    paths: AnyPath | Sequence[AnyPath],
    output: AnyPath,
    *,
    figures: AnyPath | None = None,
    data: str | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    model: str | None = None,
    **given: Any,
) -> Report:
    """Draw runs, checkpoints and packed files as one HTML page that needs no network.

    Args:
        paths: one or several of: run folders, folders of run folders (at any depth, as a sweep's), checkpoints (ours or
            released), packed files; two or more networks are compared.
        output: the page to write.
        figures: a folder to write every figure to, as PNG and SVG.
        data: test images to measure inputs and accuracy on, as ``TrainConfig.data``; by default those a run names.
        image_size: height and width of the images, pixels.
        mean, std: what the images of ``data`` are normalised with, a number a channel in units of 255; by default what
            a run records, or the published ones.
        model: ``FILE.py:FUNCTION`` that builds the network, float, where it is one of your own.
        given: ``arch``, ``bit`` and ``preset`` of a checkpoint that records none.

    Returns:
        What the page shows, as tables: ``Report.rows("layers")``.

    Raises:
        ValueError: a path that holds no network; an output that is an input, or a file of another kind.
    """
    normalization = {name: values for name, values in (("mean", mean), ("std", std)) if values is not None}
    if normalization and data is None:
        name = next(iter(normalization))
        raise ValueError(f"{name}: is for images of your own; name them with --data, or leave out {name}")
    several = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    output = output_file(output, ".html", *several)
    subjects = [
        subject for group, path in enumerate(several) for subject in load_subjects(Path(path), group, model, **given)
    ]
    layers = sum(1 for subject in subjects for _ in weight_layers(subject.model))
    with tqdm(total=layers, desc="measure", unit="layer", disable=None) as bar:
        made = build_report(subjects, data, image_size, lambda name: bar.update() and None, **normalization)
    html = page(made)
    with atomic_write(output) as temporary:
        temporary.write_text(html, encoding="utf-8")
    log.info("%s: %d networks, %.1f MB", output, len(subjects), len(html.encode()) / 1e6)
    if figures is not None:
        drawn = list(charts.figures(made))
        with tqdm(total=len(drawn), desc="figures", unit="figure", disable=None) as bar:
            written = charts.write_figures(drawn, Path(figures), lambda name: bar.update() and None)
        log.info("%s: %d files", figures, len(written))
    return made
