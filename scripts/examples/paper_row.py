"""A row of APoT's table on scikit-learn's digits: python scripts/examples/paper_row.py.

ResNet-20 at 32, 4, 3 and 2 bits, each from the best of the one before; a minute on two cores. The papers' own rows are
the same lines with ``cifar10/resnet20_apot`` and a GPU.
"""

from __future__ import annotations

from typing import Any

from apot_fat import read_recipe, report, train_chain


def main(**overrides: Any) -> None:
    """Train the row, print it, and draw it in row.html.

    Args:
        overrides: fields of ``TrainConfig`` over the recipe's.
    """
    recipe = read_recipe("digits/resnet20_apot")
    runs = train_chain(recipe, recipe.chain, {"output": "row", **overrides})
    for run in runs:
        print(f"{run.bits:>2} bits: best {run.best:.2f}%, last {run.last:.2f}%, {run.seconds:.0f} s")
    report("row", "row.html")


if __name__ == "__main__":
    main()
