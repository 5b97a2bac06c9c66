"""List the recipes and sweeps that --config takes by name: apot-fat recipes."""

from __future__ import annotations

from apot_fat.command_line import OneLineParser, say
from apot_fat.training.recipe import list_recipes


def main(argv: list[str] | None = None) -> None:
    """Print names and what each trains."""
    OneLineParser(description=__doc__).parse_args(argv)
    recipes = list_recipes()
    width = max(map(len, recipes))
    say("\n".join(f"{name:<{width}}  {about}" for name, about in recipes.items()))
