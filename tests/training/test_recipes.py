from __future__ import annotations

from pathlib import Path

import pytest
import torch

from apot_fat.data import Dataset, ImageSet
from apot_fat.models import create_model, find_architecture
from apot_fat.training import read_recipe, train_epoch
from apot_fat.training.build import make_batches
from apot_fat.training.objective import Objective
from apot_fat.training.optim import make_optimizer, make_schedule
from apot_fat.training.recipe import CONFIG_ROOT, find_recipe
from apot_fat.training.sweep import read_sweep

SIDES = {"digits": 8, "cifar10": 32, "imagenet": 224}


RECIPES = sorted(path for path in CONFIG_ROOT.glob("*/*.toml") if path.parent.name != "sweeps")


LARGER = ("resnet34", "resnet50", "resnet56")  # the blocks of resnet18 and resnet20 again


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=pytest.mark.slow if p.stem.startswith(LARGER) else ()) for p in RECIPES],
    ids=[f"{p.parent.name}/{p.stem}" for p in RECIPES],
)
def test_every_recipe_trains_two_steps(path: Path) -> None:
    recipe = read_recipe(path)
    config = recipe.config(recipe.chain[-1], {"batch_size": 2})
    classes = 1000 if config.data == "imagenet" else 10
    # an untrained MobileNetV2 of recipe ours has an infinite gradient on images of 64 to 128 pixels
    size = 64 if config.arch.startswith("resnet") and classes == 1000 else SIDES[config.data]
    images = ImageSet(torch.randint(0, 256, (4, size, size, 3), dtype=torch.uint8), torch.tensor([0, 1, 2, 3]))
    model = create_model(config.arch, config.preset, config.bit, classes)
    dataset = Dataset("synthetic", ("x",) * classes, images, images)
    assert isinstance(dataset.train, ImageSet)
    batches = make_batches(config, dataset.train, torch.device("cpu"), training=True)
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config, batches.steps)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    objective = Objective(label_smoothing=config.label_smoothing)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    result = train_epoch(model, batches, optimizer, schedule, scaler, objective=objective)
    assert result.total == 4
    assert torch.tensor(result.loss).isfinite()
    # at the published initial thresholds an untrained MobileNetV2 has only zero weights: its last layer learns alone
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_every_row_of_the_papers_has_a_recipe() -> None:
    names = {f"{path.parent.name}/{path.stem}" for path in CONFIG_ROOT.glob("*/*.toml")}
    rows = {f"cifar10/{net}_{method}" for net in ("resnet20", "resnet56") for method in ("apot", "fat", "fat-log")}
    rows |= {"cifar10/vggsmall_fat", "cifar10/vggsmall_fat-log"}
    rows |= {f"imagenet/resnet{d}_{m}" for d in (18, 34) for m in ("apot", "fat", "fat-log")}
    rows |= {"imagenet/resnet18_apot-uniform", "imagenet/resnet50_apot", "imagenet/mobilenetv2_fat"}
    assert rows <= names
    for name in rows:
        recipe = read_recipe(CONFIG_ROOT / f"{name}.toml")
        if name.startswith("imagenet"):
            assert recipe.config(recipe.chain[0]).init == "torchvision"
            assert not recipe.config(4).threshold_groups
        assert find_architecture(recipe.config(4).arch).dataset == name.split("/")[0]


def test_the_full_sweep_has_the_published_chains_whole() -> None:
    sweep = read_sweep(CONFIG_ROOT / "sweeps/cifar10_full.toml")
    for name, methods in sweep.methods.items():
        for method, widths in methods.items():
            found = find_recipe("cifar10", "resnet20", method, name)
            assert found is not None
            assert tuple(widths) == found.chain[: len(widths)]
            assert name == "ours" or tuple(widths) == found.chain
    assert sweep.methods["published"]["fat-cifar"] == [32, 5, 4, 3]


def test_every_recipe_of_ours_has_at_most_half_the_published_epochs_and_bf16_on_gpus() -> None:
    found = [path for path in RECIPES if path.stem.endswith("_ours")]
    networks = {path.stem.split("_")[0] for path in found}
    assert networks == {"resnet20", "resnet56", "vggsmall", "resnet18", "mobilenetv2"}
    for path in found:
        ours, published = read_recipe(path), read_recipe(path.with_name(path.name.replace("_ours", "")))
        assert {4, 3, 2} <= set(ours.chain)
        for bits in ours.chain:
            assert (ours.config(bits).amp, published.config(bits).amp) == ("auto", "off")
            assert 2 * ours.config(bits).epochs <= published.config(bits).epochs
            assert ours.config(bits).batch_size == published.config(bits).batch_size
