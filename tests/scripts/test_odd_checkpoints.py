"""Checkpoints with every kind of odd content, in every script that opens one: one line, exit code 2."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from apot_fat.models import create_model
from apot_fat.training import TrainConfig, train

Run = Callable[..., tuple[int, str, str]]

CONFIG = TrainConfig(arch="res20", bit=32, data="digits").to_dict()
LAYER = "layer1.0.conv1"


def odd_configs() -> dict[str, Any]:
    return {
        "an empty config": {},
        "a config that is a list": [CONFIG],
        "a config without arch": {name: value for name, value in CONFIG.items() if name != "arch"},
        "arch is a list": {**CONFIG, "arch": ["res20"]},
        "an unknown arch": {**CONFIG, "arch": "res21"},
        "a tensor for bits": {**CONFIG, "bit": torch.tensor([32, 4])},
    }


def odd_states(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    def with_weight(tensor: Any) -> dict[Any, Any]:
        return {**state, f"{LAYER}.weight": tensor}

    weight = state[f"{LAYER}.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch gives quantized tensors up
        quantized = torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)
    return {
        "integer names": dict(enumerate(state.values())),
        "a sparse tensor": with_weight(weight.to_sparse()),
        "a meta tensor": with_weight(weight.to("meta")),
        "a quantized tensor": with_weight(quantized),
        "an expanded tensor": with_weight(torch.zeros(1).expand(10**12)),
        "a complex weight": with_weight(weight.to(torch.complex64)),
        "nested lists": with_weight(_nested(200)),
    }


def _nested(levels: int) -> list[Any]:
    return [_nested(levels - 1)] if levels else []


def refused(run: Run, script: str, *argv: object) -> str:
    code, out, err = run(script, *argv)
    assert code == 2, (script, argv, out, err)
    assert err.count("\n") == 1, err
    assert err.startswith(f"{script}: error: "), err
    assert "Traceback" not in err + out
    return err


def commands(path: Path) -> list[tuple[object, ...]]:
    """Every command that opens a checkpoint and needs to know its network."""
    digits = ("--data", "digits", "--epochs", 1)
    return [
        ("evaluate.py", "--init", path, "--bit", 32),
        ("report.py", path, "--arch", "res20", "--bit", 32, "--output", "r.html"),
        ("export.py", path, "--arch", "res20", "--bit", 32, "--to", "onnx", "--output", "out"),
        ("quantize.py", "--init", path, "--arch", "res20", "--data", "digits", "--output", "out.safetensors"),
        ("train.py", "--resume", path, "--arch", "res20", "--bit", 32, *digits),
        ("train.py", "--teacher", path, "--distill-weight", 0.5, "--arch", "res20", *digits),
        ("train.py", "--init", path, "--reconstruct", 8, "--arch", "res20", *digits),
    ]


def test_odd_configs_are_refused_by_every_script(run: Run, tmp_path: Path) -> None:
    state = create_model("res20", bits=32).state_dict()
    path = tmp_path / "odd.pth"
    for kind, config in odd_configs().items():
        torch.save({"state_dict": state, "config": config, "history": []}, path)
        for command in commands(path):
            said = refused(run, *command)  # type: ignore[arg-type]
            assert f"{path}: " in said, (kind, said)
            assert "config" in said, (kind, said)


def test_odd_tensors_are_refused_by_every_script(run: Run, tmp_path: Path) -> None:
    state = create_model("res20", bits=32).state_dict()
    path = tmp_path / "odd.pth"
    for odd in odd_states(state).values():
        torch.save({"state_dict": odd}, path)
        for command in (*commands(path), ("show_params.py", path)):
            refused(run, *command)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1j])
@pytest.mark.parametrize("name", [f"{LAYER}.act_alpha", f"{LAYER}.weight", "bn1.running_var"])
def test_values_that_no_network_has_are_refused_before_they_are_computed_with(
    run: Run, tmp_path: Path, name: str, value: complex
) -> None:
    state = create_model("res20", bits=3).state_dict()
    state[name] = state[name] * value
    path = tmp_path / "odd.pth"
    torch.save({"state_dict": state}, path)
    for command in (
        ("evaluate.py", "--init", path, "--bit", 3, "--arch", "res20", "--data", "digits"),
        ("report.py", path, "--arch", "res20", "--bit", 3, "--output", "r.html"),
        ("export.py", path, "--arch", "res20", "--bit", 3, "--to", "packed", "--output", "out"),
        ("train.py", "--init", path, "--arch", "res20", "--bit", 3, "--data", "digits", "--epochs", 1),
        *([("show_params.py", path)] if name.endswith("alpha") else []),
    ):
        assert name in refused(run, *command)  # type: ignore[arg-type]
    assert not list(Path.cwd().iterdir())


def test_a_checkpoint_without_the_state_of_a_run_is_not_gone_on_from(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "odd.pth"
    digits = ("--arch", "res20", "--bit", 32, "--data", "digits", "--epochs", 1, "--recipe", "published")
    config = {**CONFIG, "epochs": 1}
    row = {"epoch": 1, "test_top1": 10.0, "seconds": 1.0, "layers": {}}
    histories: list[Any] = [None, [1], [{}], [{**row, "epoch": 2}], [{**row, "test_top1": "a"}], [{**row, "layers": 1}]]
    for history in histories:
        torch.save({"state_dict": {}, "config": config, "history": history}, path)
        said = refused(run, "train.py", "--resume", path, *digits)
        assert "history" in said or "not written by a training run" in said
    run_config = TrainConfig(arch="res20", bit=32, data="digits", epochs=1, output=str(tmp_path / "out"))
    whole = {"state_dict": create_model("res20", bits=32).state_dict(), "config": run_config.to_dict(), "history": []}
    states: list[dict[str, Any]] = [{}, {"optimizer": 1}, {"environment": []}]
    for state in (*states, {"optimizer": {"state": {}, "param_groups": []}}):
        torch.save({**whole, **state}, path)
        with pytest.raises(ValueError, match=r"the checkpoint is not one of such a run, or damaged|parameter groups"):
            train(run_config, resume=str(path))
    assert not list(Path.cwd().iterdir())
    assert not (tmp_path / "out").exists()
