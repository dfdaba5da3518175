"""From tensors, arrays and lists to the contiguous numpy arrays that the Rust side takes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def as_numpy(value: Any, name: str) -> NDArray[Any]:
    """A numpy view of a tensor (any device), array or nested list; floats below fp32 become fp32."""
    if hasattr(value, "detach"):  # a torch tensor, without importing torch
        value = value.detach()
        if value.is_floating_point() and value.element_size() < 4:
            value = value.float()
        return value.cpu().numpy()
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} is not a rectangular array: {error}") from None


def int32(value: Any, name: str, ndim: int) -> NDArray[np.int32]:
    """Contiguous int32 of `ndim` dimensions. No value is wrapped: one outside int32 raises ValueError."""
    array = as_numpy(value, name)
    if array.size == 0 and array.dtype == np.float64:  # np.asarray([]) is float64
        array = array.astype(np.int32)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {array.dtype}, integers are accepted")
    if array.ndim != ndim:
        raise ValueError(f"{name} has shape {array.shape}, {ndim} dimension{'s'[: ndim > 1]} are accepted")
    if array.dtype != np.int32 and array.size:
        low, high = int(array.min()), int(array.max())
        if low < -(2**31) or high >= 2**31:
            raise ValueError(f"{name} holds {low if low < -(2**31) else high}, which is outside int32")
    return np.ascontiguousarray(array, dtype=np.int32)


def float32(value: Any, name: str, ndim: int) -> NDArray[np.float32]:
    """Contiguous float32 of `ndim` dimensions."""
    array = as_numpy(value, name)
    if array.dtype.kind != "f":
        raise TypeError(f"{name} has dtype {array.dtype}, floating point is accepted")
    if array.ndim != ndim:
        raise ValueError(f"{name} has shape {array.shape}, {ndim} dimension{'s'[: ndim > 1]} are accepted")
    return np.ascontiguousarray(array, dtype=np.float32)
