"""Recipes: a TOML file holds the training of one network with one method at every bit-width of its chain."""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from apot_fat.models import find_architecture
from apot_fat.package_files import package_folder
from apot_fat.plain import DEEPEST, plain
from apot_fat.quant.spec import check_bits, nearest
from apot_fat.training.config import TrainConfig

CONFIG_ROOT = package_folder("configs")
PUBLISHED = "published"
_DEEP_KEY = re.compile(rf"(?<![^\s.=,])(?:[^\s.=,]++\s*+\.\s*+){{{DEEPEST}}}")


@dataclass(frozen=True)
class Recipe:
    """A recipe file.

    Args:
        path: where it was read from.
        chain: bit-widths of progressive training, each started from the best of the one before.
        base: values for every bit-width.
        by_bits: values for one bit-width, over the base (``[bits.2]`` in TOML).
    """

    path: Path
    chain: tuple[int, ...]
    base: dict[str, Any]
    by_bits: dict[int, dict[str, Any]]

    def config(self, bit: int, overrides: dict[str, Any] | None = None) -> TrainConfig:
        """The run at a bit-width; ``overrides`` come last.

        Raises:
            ValueError: an unknown key or bad value, naming the file.
        """
        values = {**self.base, **self.by_bits.get(bit, {}), "bit": bit, **(overrides or {})}
        return TrainConfig.from_dict(values, str(self.path))


def list_recipes() -> dict[str, str]:
    """The packaged recipes, and sweeps, by the name that ``--config`` takes; what the head of each says it trains."""
    found = {}
    for path in sorted(CONFIG_ROOT.glob("*/*.toml"), key=recipe_name):
        head = path.read_text(encoding="utf-8").split("# command:")[0]
        found[recipe_name(path)] = re.split(r"[:.](?:\s|$)", head.replace("\n# ", " ")[2:])[0]
    return found


def recipe_name(path: Path) -> str:
    """What ``--config`` calls a packaged recipe: its folder, the data set, and its file."""
    return f"{path.parent.name}/{path.stem}"


def config_path(source: str | os.PathLike[str]) -> Path:
    """The file of a packaged recipe or sweep, or any other.

    Args:
        source: a path, or a name of ``list_recipes``.

    Raises:
        ValueError: neither, with the nearest name.
    """
    if os.path.isfile(source):
        return Path(source)
    names = list_recipes()
    if str(source) in names:
        return CONFIG_ROOT / f"{source}.toml"
    close = nearest(str(source).removeprefix("configs/").removesuffix(".toml"), names)
    raise ValueError(f"config {source}: no such file, and no packaged recipe{close}: apot-fat recipes lists them")


def read_recipe(source: str | os.PathLike[str]) -> Recipe:
    """Read and check a recipe.

    Args:
        source: its path, or the name of a packaged one, such as ``digits/resnet20_apot`` (``list_recipes``).

    Raises:
        ValueError: no such file, no TOML, an unknown key (with the nearest known one) or a bad value.
    """
    path = config_path(source)
    content = read_toml(path)
    known = {option.name for option in fields(TrainConfig)} - {"bit"}
    sections = content.pop("bits", {})
    chain = content.pop("chain", [content.get("bit", 4)])
    single = content.pop("bit", None)
    if not isinstance(chain, list) or not chain:
        raise ValueError(f"config {path}: chain {chain!r}: expected a list of bit-widths, such as [32, 4, 3, 2]")
    for bits in chain if single is None else [*chain, single]:
        check_bits(bits, f"config {path}: chain")
        if chain.count(bits) > 1:
            raise ValueError(f"config {path}: chain {chain!r}: {bits} twice; each has one run in the output folder")
    if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
        raise ValueError(f"config {path}: bits: expected tables such as [bits.4]")
    by_bits: dict[int, dict[str, Any]] = {}
    for key, section in sections.items():
        if not key.isdigit():
            raise ValueError(f"config {path}: [bits.{key}]: expected a bit-width, such as [bits.4]")
        check_bits(int(key), f"config {path}: [bits.{key}]")
        by_bits[int(key)] = section
    for section in (content, *by_bits.values()):
        for key in section:
            if key not in known:
                raise ValueError(f"config {path}: unknown key {key!r}{nearest(key, [*known, 'bits', 'chain', 'bit'])}")
    recipe = Recipe(path, tuple([single] if single is not None else chain), content, by_bits)
    for bits in {*recipe.chain, *by_bits}:
        try:
            recipe.config(bits)
        except ValueError as error:
            raise ValueError(f"config {path}: {error}") from error
    return recipe


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        ValueError: no such file, no text, no TOML, or values nested deeper than any config's (``plain``).
    """
    if not os.path.isfile(path):
        raise ValueError(f"config {path}: no such file")
    try:
        text = Path(path).read_text(encoding="utf-8")
        if _DEEP_KEY.search(text):  # tomllib's time grows with the square of the depth
            raise RecursionError
        content = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path}: not readable as text") from error
    except RecursionError as error:
        raise ValueError(f"config {path}: nested more than {DEEPEST} levels deep") from error
    except ValueError as error:  # no TOML, or an integer of thousands of digits
        raise ValueError(f"config {path}: not TOML ({error})") from error
    return cast(dict[str, Any], plain(content, f"config {path}"))


def find_recipe(data: str, arch: str, preset: str, name: str = PUBLISHED) -> Recipe | None:
    """The recipe under ``configs/`` for a data set, network and method, or None.

    Data other than ``digits`` takes the recipe of the network's own papers.

    Args:
        name: ``published``, or that of another recipe for the same: ``ours`` is in ``…_ours.toml``.
    """
    architecture = find_architecture(arch)
    folder = "digits" if data == "digits" else architecture.dataset
    method = preset.replace("-cifar", "").replace("-imagenet", "")
    suffix = "" if name == PUBLISHED else f"_{name}"
    path = CONFIG_ROOT / folder / f"{architecture.name.replace('_', '')}_{method}{suffix}.toml"
    return read_recipe(path) if os.path.isfile(path) else None  # False for a name that is too long, too
