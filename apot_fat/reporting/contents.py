"""All that a report shows, as plain values: one table a kind of row, columns of equal length.

Measured numbers are rounded to 6 significant digits; what is not finite or not there is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from apot_fat.models import find_architecture
from apot_fat.quant.measure import Distribution, LayerMeasure, measure_layers, weight_layers
from apot_fat.quant.spec import FLOAT_BITS
from apot_fat.reporting.bits import NetworkBits, network_bits, network_method
from apot_fat.reporting.cost import CostReport, cost_report
from apot_fat.reporting.subject import Images, Subject, input_shape, load_images, read_once
from apot_fat.training.environment import environment

MOST_EPOCHS = 100  # of thresholds over time: every layer's, so thinned out
_MOST_EPOCHS_OF_ALL = 2000  # the same of all runs together
PALETTES = ("fp32", "apot", "fat", "uniform", "lsq", "pact")
_METHOD_NAMES = {"apot": "APoT", "fat": "FAT", "lsq": "LSQ", "pact": "PACT", "pot": "PoT"}

Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Report:
    """A report's contents.

    Args:
        data: what the page embeds: ``runs`` (one dict each), ``layers_named``, ``environment``, and the tables
            ``epochs``, ``thresholds``, ``layers``, ``bins``, ``levels``, ``frequencies`` and ``costs``.
        subjects: what it is about, in the order of ``runs``.
    """

    data: dict[str, Any]
    subjects: tuple[Subject, ...]

    def __repr__(self) -> str:
        return f"Report({', '.join(run['label'] for run in self.data['runs'])})"

    def rows(self, table: str, **where: int) -> list[dict[str, Any]]:
        """The rows of a table where columns have the given values; a run's label and a layer's name go along."""
        columns: Columns = self.data[table]
        chosen = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        chosen = [row for row in chosen if all(row[name] == value for name, value in where.items())]
        for row in chosen:
            row["label"] = self.data["runs"][row["run"]]["label"]
            if "layer" in row:
                row["name"] = self.data["layers_named"][row["layer"]]
        return chosen


def build_report(
    subjects: Sequence[Subject],
    data: str | None = None,
    image_size: int | None = None,
    progress: Callable[[str], None] = lambda name: None,
    **normalization: Any,
) -> Report:
    """Measure networks and gather what a report shows of them.

    Args:
        subjects: the networks, at least one.
        data: images to measure inputs and accuracy on, as ``--data``; by default those a run names, if at hand.
        image_size: height and width of the images, pixels.
        progress: told of each layer as it is done.
        normalization: ``mean`` and ``std`` of those images, in place of what is known of a network.

    Raises:
        ValueError: images that cannot be read or do not fit a network.
    """
    bits = [network_bits(subject.model) for subject in subjects]
    methods = [network_method(subject.config, own) for subject, own in zip(subjects, bits, strict=True)]
    labels, places = _labels(subjects, methods, bits), _colors(methods, bits)
    named = list(dict.fromkeys(name for subject in subjects for name, _ in weight_layers(subject.model)))
    tables: dict[str, Columns] = {}
    offsets = _offsets(subjects)
    runs, read = [], read_once()
    for run, subject in enumerate(subjects):
        images = load_images(subject, data, image_size, read, **normalization)
        shape = input_shape(subject, images, image_size)
        cost = cost_report(subject.model, shape)
        batch = images.batch if isinstance(images, Images) else None
        measures = measure_layers(subject.model, batch, progress)
        runs.append(
            {"id": run, "label": labels[run], **places[run]}
            | _bits(methods[run], bits[run])
            | _run(subject, images, cost, measures, shape, offsets[run])
            | {"notes": _notes(subject, images, methods[run])}
        )
        _add_history(tables, run, subject, offsets[run], named, min(MOST_EPOCHS, _MOST_EPOCHS_OF_ALL // len(subjects)))
        _add_layers(tables, run, bits[run], cost, measures, named)
        for row in (*cost.rows, cost.total):
            _add(tables, "costs", {"run": run, **asdict(row), "float_share": row.float_share})
    for table in ("epochs", "thresholds", "layers", "bins", "levels", "frequencies", "costs"):
        tables.setdefault(table, {"run": []})
    made = environment(torch.device("cpu")) | {"made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}
    content = {"runs": runs, "layers_named": named, "environment": made, **tables}
    return Report(content, tuple(subjects))


def _bits(method: str, bits: NetworkBits) -> dict[str, Any]:
    return {
        "method": method,
        "bits": round(bits.mean, 2) if len(set(bits.weights)) > 1 else round(bits.mean),
        "mean_bits": _short(bits.mean),
        "bits_text": bits.weights_text,
        "input_bits_text": bits.inputs_text,
        "bits_differ": bits.differ,
    }


def _run(
    subject: Subject,
    images: Images | str,
    cost: CostReport,
    measures: Sequence[LayerMeasure],
    shape: tuple[int, ...],
    offset: int,
) -> dict[str, Any]:
    best, total, config = subject.best, cost.total, subject.config
    result = images.result if isinstance(images, Images) else None
    file = subject.path if subject.path.is_file() else None
    return {
        "path": str(subject.path),
        "kind": subject.kind,
        "network": find_architecture(config.arch).name,
        "last": _short(subject.history[-1]["test_top1"]) if best else None,
        "best": _short(best["test_top1"]) if best else _short(subject.recorded),
        "best_epoch": best["epoch"] if best else None,
        "best_on": ("held-out" if "val_top1" in best else "test") if best else None,
        "epochs": len(subject.history) or None,
        "first_epoch": offset + 1,
        "seconds": _short(sum(row["seconds"] for row in subject.history)) if best else None,
        "measured": _short(result.top1) if result else None,
        "correct": result.correct if result else None,
        "images": result.total if result else None,
        "images_from": images.name if isinstance(images, Images) else None,
        "batch": len(images.batch) if isinstance(images, Images) else None,
        "input_shape": list(shape),
        "parameters": total.parameters,
        "file_bytes": file.stat().st_size if file else None,
        "float32_bytes": total.float32_bytes,
        "packed_bytes": total.packed_bytes,
        "macs": total.macs,
        "bit_operations": total.bit_operations,
        "float_bit_operations": total.macs * FLOAT_BITS**2,
        "shift_adds": total.shift_adds,
        "weight_sqnr": _mean([m.weight.sqnr for m in measures if m.weight_alpha is not None]),
        "input_sqnr": _mean([m.input.sqnr for m in measures if m.input is not None and m.act_alpha is not None]),
        "recipe": config.to_dict() if subject.trained else {},
        "environment": subject.environment,
    }


def _notes(subject: Subject, images: Images | str, method: str) -> dict[str, str]:
    # one sentence for each thing that this input cannot show
    notes = {}
    what = {"run": "run", "checkpoint": "checkpoint", "packed": "packed file"}[subject.kind]
    if not subject.history:
        notes["curves"] = f"No curves: a {what} like this one does not record its epochs."
        notes["thresholds"] = f"No thresholds over time: a {what} like this one holds the last ones only."
    if not subject.trained:
        notes["recipe"] = f"No recipe: this {what} does not record how it was trained."
    if not subject.environment:
        notes["environment"] = f"No environment: this {what} does not record what it was computed with."
    if isinstance(images, str):
        notes["inputs"] = images
    if not subject.best and subject.recorded is None and (isinstance(images, str) or images.result is None):
        notes["accuracy"] = "No accuracy: it is not recorded here. Measure it with --data."
    if method == "fp32":
        notes["levels"] = "No levels, thresholds or quantization error: this network is full precision."
    elif subject.kind == "packed":
        notes["levels"] = "No quantization error of weights: a packed file holds the quantized weights alone."
        notes["spectrum"] = "No spectrum: a packed file holds weights after FAT's transform, not the transform."
    if method == "fp32" and subject.config.preset_name.startswith("fat"):
        notes["spectrum"] = "No spectrum: a full-precision network has no transform."
    elif "fat" not in method and "spectrum" not in notes:
        notes["spectrum"] = "No spectrum: only FAT transforms its weights."
    return notes


def _add_history(
    tables: dict[str, Columns], run: int, subject: Subject, offset: int, named: list[str], most: int
) -> None:
    kept = {round(i * (len(subject.history) - 1) / max(most - 1, 1)) for i in range(max(most, 2))}
    scores = [f"{part}_{score}" for part in ("train", "test", "val") for score in ("loss", "top1")]
    for index, row in enumerate(subject.history):
        place = {"run": run, "epoch": row["epoch"], "since": offset + row["epoch"]}
        _add(tables, "epochs", place | {name: _short(row.get(name)) for name in scores})
        for name, layer in row["layers"].items() if index in kept else ():
            alphas = {side: _short(layer[side]) for side in ("weight_alpha", "act_alpha")}
            _add(tables, "thresholds", place | {"layer": named.index(name), **alphas})


def _add_layers(
    tables: dict[str, Columns],
    run: int,
    bits: NetworkBits,
    cost: CostReport,
    measures: Sequence[LayerMeasure],
    named: list[str],
) -> None:
    for measure, price in zip(measures, cost.rows, strict=False):  # the last row of costs is no layer's
        place = {"run": run, "layer": named.index(measure.name)}
        row: dict[str, Any] = {
            "kind": price.kind,
            "weight_bits": price.weight_bits,
            "act_bits": price.act_bits,
            "quantized": measure.name in bits.specs,
            "packed_bytes": price.packed_bytes,
            "weight_alpha": _short(measure.weight_alpha),
            "act_alpha": _short(measure.act_alpha),
            "mask_min": _short(min(measure.spectrum.mask_min)) if measure.spectrum else None,
            "mask_max": _short(max(measure.spectrum.mask_max)) if measure.spectrum else None,
        }
        for side, found in (("weight", measure.weight), ("input", measure.input)):
            for name in ("count", "zeros", "clipped", "sqnr"):
                row[f"{side}_{name}"] = _short(getattr(found, name)) if found else None
            row[f"{side}_step"] = found.histogram.step if found else None
            if found:
                _add_distribution(tables, place, side, found)
        _add(tables, "layers", place | row)
        if spectrum := measure.spectrum:
            for values in zip(*asdict(spectrum).values(), strict=True):
                _add(tables, "frequencies", place | dict(zip(asdict(spectrum), map(_short, values), strict=True)))


def _add_distribution(tables: dict[str, Columns], place: dict[str, int], side: str, found: Distribution) -> None:
    histogram = found.histogram
    for index, count in enumerate(histogram.counts):
        low, high = (_short(histogram.low + i * histogram.step) for i in (index, index + 1))
        _add(tables, "bins", place | {"side": side, "low": low, "high": high, "count": count})
    for level, share in zip(found.levels, found.shares, strict=True):
        _add(tables, "levels", place | {"side": side, "level": _short(level), "share": _short(share)})


def _add(tables: dict[str, Columns], table: str, row: Mapping[str, Any]) -> None:
    columns = tables.setdefault(table, {name: [] for name in row})
    for name, value in row.items():
        columns[name].append(value)


def _labels(subjects: Sequence[Subject], methods: Sequence[str], bits: Sequence[NetworkBits]) -> list[str]:
    networks = [find_architecture(subject.config.arch).name for subject in subjects]
    labels = []
    for network, method, own in zip(networks, methods, bits, strict=True):
        words = [network] if len(set(networks)) > 1 else []
        words.append(" and ".join(map(_named, method.split(" and "))))
        labels.append(" ".join([*words, own.label] if own.specs else words))
    places = _places([subject.path for subject in subjects])
    shared = [labels.count(label) > 1 for label in labels]
    labels = [f"{label} ({place})" if s else label for label, place, s in zip(labels, places, shared, strict=True)]
    return [f"{label} #{i + 1}" if labels.count(label) > 1 else label for i, label in enumerate(labels)]


def _places(paths: Sequence[Path]) -> list[Path]:
    # the last two names of each, or as many as tell them apart
    longest = max(len(path.parts) for path in paths)
    ends = ([Path(*path.parts[-count:]) for path in paths] for count in range(2, max(longest, 2) + 1))
    return next((end for end in ends if len(set(end)) == len(set(paths))), list(paths))


def _named(method: str) -> str:
    family, *variant = [part for part in method.split("-") if part not in ("cifar", "imagenet")]
    return " ".join([_METHOD_NAMES.get(family, family), *variant])


def _colors(methods: Sequence[str], bits: Sequence[NetworkBits]) -> list[dict[str, Any]]:
    # a hue for a method, shades of it for bits; the same method and bits once more take the next free hue
    taken: list[tuple[str, str]] = []
    places = []
    for method, own in zip(methods, bits, strict=True):
        family = method.replace(" ", "-").split("-")[0]
        used = {hue for hue, _ in taken}
        free = [family, *(hue for hue in (*PALETTES[3:], *PALETTES[:3]) if hue not in used)]
        hue = next((hue for hue in free if hue in PALETTES and (hue, own.label) not in taken), PALETTES[0])
        places.append({"family": family, "hue": hue, "shade": sum(other == hue for other, _ in taken) % 3})
        taken.append((hue, own.label))
    return places


def _offsets(subjects: Sequence[Subject]) -> list[int]:
    # epochs before a run's first, in the runs beside it that it started from
    def before(run: int, seen: tuple[int, ...] = ()) -> int:
        subject = subjects[run]
        source = subject.config.weights_path(subject.config.init) if subject.trained else None
        folder = Path(source).parent.name if source else ""
        for other, candidate in enumerate(subjects):
            is_parent = candidate.path == subject.path.parent / folder and candidate.group == subject.group
            if is_parent and other not in (*seen, run):
                return before(other, (*seen, run)) + len(candidate.history)
        return 0

    return [before(run) for run in range(len(subjects))]


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None]
    return _short(sum(finite) / len(finite)) if finite else None


def _short(value: Any) -> Any:
    if value is None or isinstance(value, int):
        return value
    return float(f"{float(value):.6g}") if math.isfinite(value) else None
