"""What a loss in parts takes, checked at the public edge: tiles of the vocabulary, or its shards over processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from potstill.divergences import Divergence
from potstill.mixtures import Masked, Mix
from potstill.teachers import Head

if TYPE_CHECKING:
    from potstill.arguments import Call


def check_parts(call: Call, teacher: Any, low_memory: bool) -> None:
    """Raise ValueError where the objective needs more of a row at once than a part of it."""
    why = "low_memory=True" if low_memory else "a head in shards"
    remedy = (
        "leave low_memory out: the peak is then two buffers of chunk_rows x V"
        if low_memory and call.shard is None
        else "give every process the whole head (potstill.distributed.materialized_head)"
    )
    if isinstance(teacher, (Mix, Masked)):
        raise ValueError(
            f"{why} takes a HiddenTeacher, a LogitsTeacher or a TopK, not a {type(teacher).__name__}; {remedy}"
        )
    if not isinstance(call.divergence, Divergence):
        raise ValueError(f"{why} takes divergences that are sums, not {call.divergence.name!r}; {remedy}")
    if call.metrics:
        raise ValueError(f"{why} measures 'distill' and 'ce' only, not {call.metrics[0]!r}; {remedy}")


def same_shard(student: Head | None, teacher: Head) -> None:
    """Raise ValueError unless both heads are whole, or hold the same ids in the same group."""
    if student is None:
        return
    ours, theirs = ((h.vocab_start, h.real_rows, getattr(h.group, "group_name", None)) for h in (student, teacher))
    if ours != theirs:
        raise ValueError(
            "the student's head holds (vocab_start, rows, group) "
            f"{ours} and the teacher's {theirs}; cut both vocabularies alike"
        )


def shard_arguments(head: Head, low_memory: bool) -> tuple[int, str, bool]:
    """The op's start, group and tiled."""
    return head.vocab_start or 0, "" if head.group is None else head.group.group_name, low_memory
