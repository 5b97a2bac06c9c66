from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from apot_fat import QuantConv2d, preset, quantize
from apot_fat.models import create_model
from apot_fat.training.sharded import replicate_scalars
from tests.training.test_distributed import ROOT, run, torchrun

WORKER = Path(__file__).with_name("sharded_worker.py")
NETWORKS = ("apot", "fat", "create_model")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """What each network gave in one process, and under ``fully_shard`` in two."""
    path = tmp_path_factory.mktemp("sharded") / "outcomes.pt"
    done = run(torchrun(2, WORKER, path), ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(path)


@pytest.mark.parametrize("network", NETWORKS)
def test_two_sharded_processes_train_as_one_does(outcomes: dict[str, Any], network: str) -> None:
    alone, sharded = outcomes[network]
    torch.testing.assert_close(sharded["losses"], alone["losses"], rtol=1e-9, atol=0)
    assert list(sharded["state"]) == list(alone["state"])
    assert any(name.endswith("_alpha") and value.dim() == 0 for name, value in alone["state"].items())
    for name, value in alone["state"].items():
        assert sharded["state"][name].shape == value.shape
        torch.testing.assert_close(sharded["state"][name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_saved_state_of_a_sharded_network_gives_its_outputs_in_a_plain_one(
    outcomes: dict[str, Any], network: str
) -> None:
    sharded = outcomes[network][1]
    torch.testing.assert_close(sharded["loaded"], sharded["outputs"], rtol=1e-12, atol=0)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_a_sharded_network_in_evaluation_sees_every_change_of_its_weights(group: None) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 3)).eval()
    quantize(model, bits=3)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)), ignored_params=replicate_scalars(model))
    assert isinstance(model, FSDPModule)
    x = torch.rand(2, 3, 8, 8)

    def output() -> Tensor:
        with torch.no_grad():
            return model(x)

    for _ in range(6):
        kept = output()
        model.eval()  # nothing kept is left
        assert torch.equal(kept, output())
        model.reshard()
        with torch.no_grad():
            for parameter in model.parameters():
                if isinstance(parameter, DTensor):
                    parameter.mul_(1.3)


def test_what_learns_no_threshold_has_nothing_to_replicate(group: None) -> None:
    assert replicate_scalars(create_model("resnet20", bits=32)) == set()


def test_scalars_are_replicated_in_a_process_group_alone() -> None:
    with pytest.raises(ValueError, match=r"no process group: call torch\.distributed\.init_process_group"):
        replicate_scalars(nn.Linear(2, 2))


def test_a_network_on_the_meta_device_is_refused(group: None) -> None:
    with torch.device("meta"):
        layer = QuantConv2d(2, 2, 1, spec=preset("lsq", bits=3))
    with pytest.raises(ValueError, match="weight_alpha is on the meta device: give the network its weights first"):
        replicate_scalars(layer)
