"""What a sequence may hold besides top-k rows: hidden states, scores, class vectors, named values of each token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from potstill.cache.arrays import as_numpy

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {"fp16": 2, "bf16": 2, "fp32": 4}
MAX_COLUMNS = 64


@dataclass(frozen=True)
class Column:
    """`width` finite numbers of `dtype` ("fp16", "bf16" or "fp32") for each token, or for the sequence (`per`).

    labels: names of the numbers, for instance those of scores; empty, or `width` different ones.
    """

    name: str
    dtype: str = "fp16"
    width: int = 1
    per: str = "token"
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        if not isinstance(self.name, str) or not 1 <= len(self.name.encode()) <= 64:
            raise ValueError(f"Column.name is {self.name!r}, a str of 1 to 64 bytes is accepted")
        if self.dtype not in DTYPES:
            raise ValueError(f"Column.dtype is {self.dtype!r}, one of {', '.join(DTYPES)} is accepted")
        if self.per not in ("token", "sequence"):
            raise ValueError(f'Column.per is {self.per!r}, "token" or "sequence" is accepted')
        if not isinstance(self.width, int) or not 1 <= self.width <= (1 << 20) // DTYPES[self.dtype]:
            raise ValueError(f"Column.width is {self.width!r}, 1 to {(1 << 20) // DTYPES[self.dtype]} is accepted")
        if self.labels and len(set(self.labels)) != self.width:
            raise ValueError(f"Column.labels is {self.labels!r}, {self.width} different names are needed")

    @classmethod
    def hidden(cls, width: int, dtype: str = "bf16") -> Column:
        """Hidden states [L, width] of each token: "hidden"."""
        return cls("hidden", dtype, width)

    @classmethod
    def scores(cls, *labels: str) -> Column:
        """Named fp32 numbers of each sequence, a reward for instance: "scores"."""
        return cls("scores", "fp32", len(labels), "sequence", labels)

    @classmethod
    def classes(cls, width: int) -> Column:
        """A small fp32 vector of each sequence, logits of a classifier for instance: "classes"."""
        return cls("classes", "fp32", width, "sequence")

    @property
    def stride(self) -> int:
        """Bytes of one row."""
        return self.width * DTYPES[self.dtype]

    def rows(self, tokens: int) -> int:
        return tokens if self.per == "token" else 1

    def to_dict(self) -> dict[str, Any]:
        stored: dict[str, Any] = {"name": self.name, "dtype": self.dtype, "width": self.width, "per": self.per}
        return {**stored, "labels": list(self.labels)} if self.labels else stored

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Column:
        known = {name: stored[name] for name in ("name", "dtype", "width", "per", "labels") if name in stored}
        return cls(**known)

    def encode(self, value: Any, key: str, tokens: int) -> NDArray[np.uint8]:
        """The stored bytes of `value`: [L] or [L, width] for tokens, [width] or a mapping of labels for a sequence; for
        bf16 also its bits as uint16. Numbers are rounded to the nearest of the dtype. Raises ValueError naming sequence
        and column."""
        where = f"sequence {key!r}: {self.name}"
        if isinstance(value, Mapping):
            if sorted(value) != sorted(self.labels):
                raise ValueError(f"{where} has {sorted(value)}, {sorted(self.labels)} are needed")
            value = [value[label] for label in self.labels]
        shape = tuple(getattr(value, "shape", ())) or np.shape(as_numpy(value, where))
        accepted: list[tuple[int, ...]] = [(tokens, self.width)] if self.per == "token" else [(self.width,)]
        if self.width == 1 and self.per == "token":
            accepted.append((tokens,))
        if shape not in accepted:
            raise ValueError(f"{where} has shape {list(shape)}, {list(accepted[-1])} is needed")
        if hasattr(value, "detach"):
            import torch

            return value.detach().to("cpu", torch_dtype(self.dtype)).contiguous().view(-1).view(torch.uint8).numpy()
        array = as_numpy(value, where)
        if array.dtype.kind not in "fiu":
            raise TypeError(f"{where} has dtype {array.dtype}, numbers are accepted")
        if self.dtype == "bf16" and array.dtype == np.uint16:
            stored: NDArray[Any] = np.ascontiguousarray(array)
        elif self.dtype == "bf16":
            stored = _bf16_bits(np.ascontiguousarray(array, np.float32))
        else:
            with np.errstate(over="ignore"):  # what overflows is refused as not finite
                stored = np.ascontiguousarray(array, np.float16 if self.dtype == "fp16" else np.float32)
        return stored.reshape(-1).view(np.uint8)

    def numpy(self, stored: NDArray[np.uint8]) -> NDArray[Any]:
        """Stored bytes of one sequence as an array that shares their memory, bf16 as uint16."""
        values = stored.view({"fp16": np.float16, "bf16": np.uint16, "fp32": np.float32}[self.dtype])
        return values if self.width == 1 or self.per == "sequence" else values.reshape(-1, self.width)

    def tensor(self, stored: NDArray[np.uint8], *rows: int) -> Tensor:
        """Stored bytes as a tensor that shares their memory: [*rows] or [*rows, width]; [width] for a sequence."""
        import torch

        values = torch.from_numpy(stored).view(torch_dtype(self.dtype))
        return values.view(*rows) if self.width == 1 and self.per == "token" else values.view(*rows, self.width)


def torch_dtype(dtype: str) -> Any:
    import torch

    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]


def _bf16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bits of the nearest bf16, ties to even; what is not finite becomes infinity."""
    bits = np.where(np.isfinite(values), values, np.float32(np.inf)).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def normalised(columns: Any) -> tuple[Column, ...]:
    """A spec's columns from columns and names (fp16, one number a token)."""
    if isinstance(columns, (str, Column)):
        columns = (columns,)
    found = tuple(Column(c) if isinstance(c, str) else c for c in columns)
    for c in found:
        if not isinstance(c, Column):
            raise TypeError(f"Spec.columns holds a {type(c).__name__}; Column(...) and names are accepted")
    if len({c.name for c in found}) != len(found) or len(found) > MAX_COLUMNS:
        raise ValueError(
            f"Spec.columns are {[c.name for c in found]}: at most {MAX_COLUMNS} different names are accepted"
        )
    return found
