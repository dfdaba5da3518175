"""Memory that rows are decoded into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from potstill.cache.spec import Spec

if TYPE_CHECKING:
    from potstill.teachers import TopK


@dataclass
class Buffers:
    """Memory for N rows, to be filled again and again (`Cache.batch(out=)`, `Cache.packed(out=)`): flat numpy arrays
    ids int32 and log_probs fp32 [N * K], log_rest fp32 [N]; None where the spec has no such column: extra fp32 [N * E],
    lse fp32 [N], counts int32 [N * K]."""

    ids: NDArray[np.int32]
    log_probs: NDArray[np.float32]
    log_rest: NDArray[np.float32]
    extra: NDArray[np.float32] | None
    lse: NDArray[np.float32] | None
    counts: NDArray[np.int32] | None

    @classmethod
    def empty(cls, spec: Spec, n: int, *, pin_memory: bool = False) -> Buffers:
        """Memory for n rows, not yet written; page-locked on request (needs CUDA)."""

        def new(dtype: type, width: int = 1) -> NDArray[Any]:
            if not pin_memory:
                return np.empty(n * width, dtype)
            import torch

            return torch.empty(n * width, dtype=getattr(torch, dtype.__name__), pin_memory=True).numpy()

        k, e = spec.k, len(spec.extra_columns)
        return cls(
            new(np.int32, k),
            new(np.float32, k),
            new(np.float32),
            new(np.float32, e) if e else None,
            new(np.float32) if spec.values == "bf16_logits" else None,
            new(np.int32, k) if spec.sampled else None,
        )

    def widths(self, spec: Spec) -> dict[str, int]:
        """Numbers of each column in a row."""
        k = spec.k
        return {"ids": k, "log_probs": k, "log_rest": 1, "extra": len(spec.extra_columns), "lse": 1, "counts": k}

    def part(self, spec: Spec, first: int, end: int) -> Buffers:
        """Rows first to end, in the same memory."""
        found: dict[str, Any] = {}
        for name, width in self.widths(spec).items():
            array = getattr(self, name)
            found[name] = None if array is None else array[first * width : end * width]
        return Buffers(**found)

    def checked(self, spec: Spec, rows: int) -> Buffers:
        """The first `rows` rows. Raises ValueError when they are not there or a column's memory does not fit."""
        for name, like in vars(Buffers.empty(spec, 0)).items():
            array, width = getattr(self, name), self.widths(spec)[name]
            if array is None:
                continue
            right = (
                isinstance(array, np.ndarray) and array.ndim == 1 and array.flags.c_contiguous and array.flags.writeable
            )
            dtype = np.dtype(np.int32 if name in ("ids", "counts") else np.float32)
            if like is None or not right or array.dtype != dtype or len(array) < rows * width:
                raise ValueError(
                    f"out.{name} is {getattr(array, 'dtype', type(array).__name__)} of {np.shape(array)}: a "
                    f"contiguous, writable array of {dtype} and at least {rows * width} numbers is needed"
                    + ("" if like is not None else ", and the spec has no such column")
                )
        return self.part(spec, 0, rows)

    def clear(self) -> None:
        """Missing rows: ids -1, log_probs -inf, the rest 0."""
        self.ids.fill(-1)
        self.log_probs.fill(-np.inf)
        for column in (self.log_rest, self.extra, self.lse, self.counts):
            if column is not None:
                column.fill(0)

    def topk(self, spec: Spec, shape: tuple[int, ...]) -> TopK:
        """The rows as torch tensors that share this memory (further columns are strided), [*shape, K] and shape."""
        import torch

        from potstill.teachers import TopK

        def tensor(array: NDArray | None, *last: int) -> torch.Tensor | None:
            return None if array is None else torch.from_numpy(array).view(*shape, *last)

        extra = tensor(self.extra, len(spec.extra_columns))
        columns = {name: extra[..., i] for i, name in enumerate(spec.extra_columns)} if extra is not None else {}
        ids, log_probs = tensor(self.ids, spec.k), tensor(self.log_probs, spec.k)
        assert ids is not None and log_probs is not None
        return TopK(
            ids,
            log_probs,
            log_rest=tensor(self.log_rest),
            lse=tensor(self.lse),
            counts=tensor(self.counts, spec.k),
            token_log_probs=columns.get("token_log_probs"),
            log_rest_at={t: column for t, column in columns.items() if isinstance(t, float)},
        )
