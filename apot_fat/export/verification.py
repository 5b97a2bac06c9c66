"""An ONNX file beside the network that it was made from: both are run, and their outputs compared."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

FLOAT_LIMIT = 1e-4
"""Largest relative error of a float file, or ``OWN_ERRORS`` times PyTorch's own, see ``export_onnx``."""
OWN_ERRORS = 3
_TIE = 1e-6  # outputs closer than this, relative to the norm, are equal
_INPUTS = 8
_CHUNK = 64  # inputs run at once


def verify(content: bytes, reference: nn.Module, x: Tensor, max_error: float | None) -> tuple[float, float, float]:
    """Run a file and its network, float32 and in evaluation mode, on a batch.

    Returns:
        ``error`` and ``agreement`` as of ``OnnxReport``; and the largest error allowed: ``max_error`` or, without it,
        what float arithmetic leaves, see ``export_onnx``.
    """
    expected = _outputs(reference, x)
    error, agreement = _compare(_run(content, x.numpy()), expected)
    if max_error is None:
        max_error = FLOAT_LIMIT
        if error > max_error:
            in_double = _outputs(copy.deepcopy(reference).double(), x.double())
            max_error = max(max_error, OWN_ERRORS * _compare(in_double, expected)[0])
    return error, agreement, max_error


def verifying_inputs(given: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """A batch of inputs of a shape, on the CPU: those given, or a few normally distributed ones.

    Raises:
        ValueError: given ones of another shape, none, or not finite.
    """
    if given is None:
        return torch.randn(_INPUTS, *shape, generator=torch.Generator().manual_seed(0))
    if given.shape[1:] != shape or not len(given):
        raise ValueError(f"verify_with {tuple(given.shape)}: expected (N, {', '.join(map(str, shape))}), N at least 1")
    x = given.detach().to("cpu", torch.float32).contiguous()
    if not x.isfinite().all():
        raise ValueError("verify_with: holds NaN or infinity; give inputs that the network is for")
    return x


def open_session(content: bytes) -> Any:
    """An onnxruntime session of a file on the CPU, which says nothing but errors."""
    import onnxruntime as runtime

    options = runtime.SessionOptions()
    options.log_severity_level = 3
    return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def parts_bar(parts: Iterable[Any], label: str) -> Iterable[Any]:
    """A bar over parts of a batch, on a terminal."""
    return tqdm(parts, desc=label, unit="part", leave=False, disable=None)


def _outputs(network: nn.Module, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        parts = parts_bar(x.split(_CHUNK), "verify: PyTorch")
        return torch.cat([_only_output(network(part)) for part in parts]).numpy()


def _only_output(y: Any) -> Tensor:
    if not isinstance(y, Tensor):
        raise ValueError(f"the network's output is a {type(y).__name__}: export one whose output is one tensor")
    return y


def _run(content: bytes, x: np.ndarray) -> np.ndarray:
    session = open_session(content)
    name = session.get_inputs()[0].name
    starts = parts_bar(range(0, len(x), _CHUNK), "verify: onnxruntime")
    return np.concatenate([session.run(None, {name: x[start : start + _CHUNK]})[0] for start in starts])


def _compare(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    # median relative error, and the share with the same largest output (or another as large)
    if found.shape != expected.shape:
        return np.inf, 0.0
    rows_found, rows = found.reshape(len(found), -1).astype(float), expected.reshape(len(expected), -1).astype(float)
    norms = np.maximum(np.linalg.norm(rows, axis=1), np.finfo(np.float32).tiny)
    error = float(np.median(np.linalg.norm(rows_found - rows, axis=1) / norms))
    there = rows[np.arange(len(rows)), rows_found.argmax(1)]
    return error, float((there >= rows.max(1) - _TIE * norms).mean())
