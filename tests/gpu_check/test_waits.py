from __future__ import annotations

import torch

from apot_fat.gpu_check.waits import waits


def test_a_number_read_from_a_tensor_is_a_wait() -> None:
    x = torch.ones(3, requires_grad=True)
    with waits(torch.device("cpu")) as found:
        (2 * x).sum().backward()
        assert not found
        assert x.grad is not None
        assert x.grad.sum().item() == 6
        assert x.isfinite().all()
    assert found.total() == 2
