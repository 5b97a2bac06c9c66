from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from apot_fat.models import create_model
from apot_fat.quant import clipping_table, fit_threshold, initialize_thresholds, threshold_layers
from apot_fat.quant.seam import set_kernels
from apot_fat.quant.watching import watch_inputs


def test_thresholds_of_a_network_on_a_batch() -> None:
    set_kernels("eager")  # the same arithmetic with gradients and without
    model = create_model("resnet20", "fat-cifar", 3, num_classes=4)
    x = torch.randn(8, 3, 16, 16)
    before = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    initialize_thresholds(model, x)
    assert model.training
    assert {k: id(v) for k, v in model.named_parameters()} == {k: id(v) for k, v in parameters.items()}
    for name, tensor in model.state_dict().items():
        if not name.endswith("_alpha"):
            torch.testing.assert_close(tensor, before.state_dict()[name], atol=0, rtol=0)
    layers = dict(threshold_layers(model))
    seen: dict[str, torch.Tensor] = {}
    last = layers["layer3.2.conv2"]
    with watch_inputs([last], lambda _, inputs: seen.update(x=inputs[0])):
        model(x)  # what training sees first: the network quantized up to there, with the batch's statistics
    assert last.act_alpha is not None
    assert last.act_alpha.item() == fit_threshold(seen["x"].relu(), last.spec.act_set, signed=False)
    for layer in layers.values():
        assert layer.weight_alpha is not None
        expected = fit_threshold(layer.transformed_weight(), layer.spec.weight_set, signed=True)
        assert layer.weight_alpha.item() == expected
    rows = clipping_table(model)
    initialize_thresholds(model.eval(), x)
    assert clipping_table(model) == rows
    assert not any(module.training for module in model.modules())


def test_bad_requests() -> None:
    model = create_model("resnet20", bits=3)
    with pytest.raises(ValueError, match="threshold rule 'least': choose one of mse"):
        initialize_thresholds(model, torch.rand(2, 3, 8, 8), "least")
    with pytest.raises(ValueError, match="no quantized layer"):
        initialize_thresholds(nn.Linear(2, 2), torch.rand(2, 2))
    with pytest.raises(ValueError, match=r"shape \(2, 5\): the network refuses it"):
        initialize_thresholds(model, torch.rand(2, 5))
    assert model.training
