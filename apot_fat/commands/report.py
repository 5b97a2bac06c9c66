"""Draw runs, checkpoints and packed files as one HTML page: apot-fat report PATH… --output FILE.html."""

from __future__ import annotations

from apot_fat.command_line import OneLineParser, add_model_option, add_normalization_options
from apot_fat.reporting import report


def main(argv: list[str] | None = None) -> None:
    """Write the page, and with ``--figures`` each figure as PNG and SVG."""
    parser = OneLineParser(description=__doc__)
    paths = "run folders, folders of run folders (a sweep's too), checkpoints (ours or released), packed files"
    parser.add_argument("paths", nargs="+", metavar="PATH", help=f"{paths}; two or more are compared")
    parser.add_argument("--output", required=True, metavar="FILE.html", help="the page to write")
    parser.add_argument("--figures", metavar="DIR", help="write every figure as PNG and SVG too")
    parser.add_argument(
        "--data", metavar="NAME", help="test images to measure inputs and accuracy on: as --data of train"
    )
    parser.add_argument("--image-size", type=int, metavar="N", help="height and width of the images, pixels")
    add_normalization_options(parser)
    parser.add_argument("--arch", "-a", help="network of a checkpoint that records none")
    parser.add_argument("--bit", type=int, help="bits of a checkpoint that records none")
    parser.add_argument("--preset", help="variant of a checkpoint that records none")
    add_model_option(parser)
    options = parser.parse_args(argv)
    report(
        options.paths,
        options.output,
        figures=options.figures,
        data=options.data,
        image_size=options.image_size,
        mean=options.mean,
        std=options.std,
        model=options.model,
        arch=options.arch,
        bit=options.bit,
        preset=options.preset,
    )
