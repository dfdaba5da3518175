"""Memory that rows are decoded into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from potstill.cache.spec import Spec

if TYPE_CHECKING:
    from potstill.teachers import TopK


@dataclass
class Buffers:
    """Flat arrays of N rows: ids int32 and log_probs fp32 [N * K], log_rest fp32 [N]; None where the spec has no such
    column: extra fp32 [N * E], lse fp32 [N], counts int32 [N * K]."""

    ids: NDArray[np.int32]
    log_probs: NDArray[np.float32]
    log_rest: NDArray[np.float32]
    extra: NDArray[np.float32] | None
    lse: NDArray[np.float32] | None
    counts: NDArray[np.int32] | None

    @classmethod
    def empty(cls, spec: Spec, n: int) -> Buffers:
        """Memory for n rows, not yet written."""
        k, e = spec.k, len(spec.extra_columns)
        return cls(
            np.empty(n * k, np.int32),
            np.empty(n * k, np.float32),
            np.empty(n, np.float32),
            np.empty(n * e, np.float32) if e else None,
            np.empty(n, np.float32) if spec.values == "bf16_logits" else None,
            np.empty(n * k, np.int32) if spec.sampled else None,
        )

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
