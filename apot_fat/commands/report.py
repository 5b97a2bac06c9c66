"""Draw runs, checkpoints and packed files as one HTML page: apot-fat report PATH… --output FILE.html."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from apot_fat.checkpoint import atomic_write
from apot_fat.command_line import OneLineParser, add_model_option, log, output_file
from apot_fat.quant.measure import weight_layers
from apot_fat.report.charts import figures, write_figures
from apot_fat.report.contents import build_report
from apot_fat.report.page import page
from apot_fat.report.subject import load_subjects


def main(argv: list[str] | None = None) -> None:
    """Write the page, and with ``--figures`` each figure as PNG and SVG."""
    parser = OneLineParser(description=__doc__)
    paths = "run folders, folders of run folders, checkpoints (ours or released), packed files"
    parser.add_argument("paths", nargs="+", metavar="PATH", help=f"{paths}; two or more are compared")
    parser.add_argument("--output", required=True, metavar="FILE.html", help="the page to write")
    parser.add_argument("--figures", metavar="DIR", help="write every figure as PNG and SVG too")
    parser.add_argument(
        "--data", metavar="NAME", help="test images to measure inputs and accuracy on: as --data of train"
    )
    parser.add_argument("--image-size", type=int, metavar="N", help="height and width of the images, pixels")
    parser.add_argument("--arch", "-a", help="network of a checkpoint that records none")
    parser.add_argument("--bit", type=int, help="bits of a checkpoint that records none")
    parser.add_argument("--preset", help="variant of a checkpoint that records none")
    add_model_option(parser)
    options = parser.parse_args(argv)
    output = output_file(options.output, ".html", *options.paths)
    given = {name: getattr(options, name) for name in ("arch", "bit", "preset")}
    subjects = [
        subject
        for group, path in enumerate(options.paths)
        for subject in load_subjects(Path(path), group, options.model, **given)
    ]
    layers = sum(1 for subject in subjects for _ in weight_layers(subject.model))
    with tqdm(total=layers, desc="measure", unit="layer", disable=None) as bar:
        report = build_report(subjects, options.data, options.image_size, lambda name: bar.update() and None)
    html = page(report)
    with atomic_write(output) as temporary:
        temporary.write_text(html, encoding="utf-8")
    log.info("%s: %d networks, %.1f MB", output, len(subjects), len(html.encode()) / 1e6)
    if options.figures:
        drawn = list(figures(report))
        with tqdm(total=len(drawn), desc="figures", unit="figure", disable=None) as bar:
            written = write_figures(drawn, Path(options.figures), lambda name: bar.update() and None)
        log.info("%s: %d files", options.figures, len(written))
