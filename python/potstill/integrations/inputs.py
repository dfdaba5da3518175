"""What of a batch goes into a model's forward."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from potstill.capture.hidden import unwrap

# what a batch of packed rows carries beside position_ids, for kernels that take sequence boundaries
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
PACKED_SINCE = (4, 53)  # the transformers whose masks begin again where position_ids do


def model_inputs(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The items of a batch that the model's forward takes by name, `use_cache=False` beside them.

    Left out are labels, teacher columns, and what the forward does not name (keys, prompts, lengths); boundaries of
    packed rows pass where the forward takes any keyword.
    """
    parameters = inspect.signature(unwrap(model).forward).parameters
    named = {name for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        named.update(PACKED)
    taken = {n: v for n, v in batch.items() if n in named and n != "labels" and not n.startswith("teacher_")}
    if "use_cache" in named:
        taken.setdefault("use_cache", False)
    return taken


def check_packing(model: Any, batch: Mapping[str, Any]) -> None:
    """Raises ValueError where sequences packed into one row would attend to each other."""
    if batch.get("attention_mask") is not None or batch.get("position_ids") is None:
        return
    attention = str(getattr(unwrap(model).config, "_attn_implementation", ""))
    from transformers import __version__

    if not attention.startswith("flash") and tuple(int(x) for x in __version__.split(".")[:2]) < PACKED_SINCE:
        raise ValueError(
            f"attn_implementation={attention!r} of transformers {__version__} does not keep packed sequences apart: "
            f"take flash attention, transformers >= {PACKED_SINCE[0]}.{PACKED_SINCE[1]}, or padded batches"
        )
