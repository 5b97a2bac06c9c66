"""Training: configuration, recipes, the loop, runs and progressive bit-width."""

from apot_fat.training.config import TrainConfig
from apot_fat.training.folder import RunSummary, summarize
from apot_fat.training.loop import Result, evaluate, train_epoch
from apot_fat.training.progressive import train_chain
from apot_fat.training.recipe import Recipe, find_recipe, list_recipes, read_recipe
from apot_fat.training.run import train

__all__ = [
    "Recipe",
    "Result",
    "RunSummary",
    "TrainConfig",
    "evaluate",
    "find_recipe",
    "list_recipes",
    "read_recipe",
    "summarize",
    "train",
    "train_chain",
    "train_epoch",
]
