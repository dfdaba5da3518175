"""Which process builds what: rank and world size from the launcher, and a plan that depends on keys alone.

A cache folder needs no coordinator: every process walks the same text and does what is its own. Where there is text
enough, teams of processes share it out in groups of documents, and each process reads and tokenises its team's alone.
"""

from __future__ import annotations

import hashlib
import heapq
import os
from collections.abc import Mapping
from typing import NamedTuple

# (who sets them, names of the rank, names of the world size), the innermost launcher first
_LAUNCHERS = (
    ("torchrun or accelerate", ("RANK",), ("WORLD_SIZE",)),
    ("MPI", ("PMI_RANK",), ("PMI_SIZE",)),
    ("MPI", ("OMPI_COMM_WORLD_RANK",), ("OMPI_COMM_WORLD_SIZE",)),
    ("MPI", ("MV2_COMM_WORLD_RANK",), ("MV2_COMM_WORLD_SIZE",)),
    ("srun", ("SLURM_PROCID",), ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")),
)


class Shard(NamedTuple):
    """Process `rank` of `world` (0 <= rank < world); `source` says where the numbers came from."""

    rank: int = 0
    world: int = 1
    source: str = "a single process"

    def owns(self, key: str) -> bool:
        """True for the keys that this process builds; each key has exactly one owner in a world."""
        return shard_of(key, self.world) == self.rank


def shard_of(key: str, world: int) -> int:
    """The rank, 0 to world - 1, that builds `key`: a hash of the key alone, the same on every machine.

    Nothing else enters, so no order of documents, no earlier run and no other world size moves a key within a
    world. The shares are even but for chance: n keys on w ranks differ by about sqrt(n / w).
    """
    if world < 1:
        raise ValueError(f"a world of {world}: at least 1 process is needed")
    digest = hashlib.blake2b(key.encode(), digest_size=8, person=b"potstill plan").digest()
    return int.from_bytes(digest, "little") % world


# A team gets groups of documents that differ by at most one: with so many of them the shares are even within 6 %.
GROUPS_A_TEAM = 16


class Groups:
    """Which groups of documents process `shard` tokenises; `within` is its place among those that do the same.

    The processes are cut into as many teams of equal size as have GROUPS_A_TEAM groups each, 1 at least; process r is
    in team r % teams. A group goes to the team that has been given the fewest bytes. So every process of a world finds
    the same without asking, and which rows there are depends on neither.

    count: groups there will be, about; None or 1 where that is not known: one team, which does everything.
    """

    def __init__(self, shard: Shard, count: float | None = None) -> None:
        fits = [d for d in range(1, shard.world + 1) if shard.world % d == 0 and d * GROUPS_A_TEAM <= (count or 1)]
        self.teams = max(fits, default=1)
        self.team = shard.rank % self.teams
        self.within = Shard(shard.rank // self.teams, shard.world // self.teams, shard.source)
        self._given = [(0, team) for team in range(self.teams)]

    def owns_next(self, size: int) -> bool:
        """Whether the next group, of so many bytes, is this team's. Every group is asked for, in order."""
        given, team = self._given[0]
        heapq.heapreplace(self._given, (given + size, team))
        return team == self.team


def parse_shard(text: str) -> Shard:
    """`i/n` as given to --shard: rank i of n, counted from 0."""
    rank, _, world = text.partition("/")
    if not (rank.strip().isdecimal() and world.strip().isdecimal()):
        raise ValueError(
            f"--shard is {text!r}: I/N is accepted, rank I of N processes with I from 0 (for instance 0/4)"
        )
    return _checked(int(rank), int(world), "--shard")


def rank_and_world(
    shard: str | tuple[int, int] | Shard | None = None, environ: Mapping[str, str] | None = None
) -> Shard:
    """(rank, world, source) of this process.

    shard: "i/n" or (i, n), which says it outright. Otherwise the environment does: torchrun and accelerate (RANK,
    WORLD_SIZE), MPI's, srun (SLURM_PROCID, SLURM_STEP_NUM_TASKS or SLURM_NTASKS); without any, rank 0 of 1. A
    batch script's own process is one process, whatever its job has been granted.

    torchrun may run inside srun: its world is then srun's, or a multiple. Raises ValueError for anything else that
    contradicts, and for numbers that are none.
    """
    environ = os.environ if environ is None else environ
    found = [claim for names in _LAUNCHERS if (claim := _claim(environ, *names))]
    # a world of 1 says nothing: srun starts torchrun once, an interactive shell is a step of one task
    found = [claim for claim in found if claim.world > 1]
    if shard is not None:
        given = parse_shard(shard) if isinstance(shard, str) else _checked(shard[0], shard[1], "shard")
        for claim in found:
            if (claim.rank, claim.world) != (given.rank, given.world):
                raise _contradiction(given, claim)
        return given
    if not found:
        return Shard()
    first = found[0]
    for other in found[1:]:
        same = (first.rank, first.world) == (other.rank, other.world)
        inside = first.world > other.world and first.world % other.world == 0
        # torchrun numbers the nodes in the order in which they arrive
        inside |= first.world == other.world and "TORCHELASTIC_RUN_ID" in environ and first.source == _LAUNCHERS[0][0]
        if not (same or inside):
            raise _contradiction(first, other)
    return first


def local_rank(environ: Mapping[str, str] | None = None) -> int:
    """Number of this process on its machine, as the launcher says; 0 without one. It chooses among several GPUs."""
    environ = os.environ if environ is None else environ
    for name in (
        "LOCAL_RANK",
        "MPI_LOCALRANKID",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "SLURM_LOCALID",
    ):
        if environ.get(name, "").isdecimal():
            return int(environ[name])
    return 0


def _claim(environ: Mapping[str, str], source: str, ranks: tuple[str, ...], worlds: tuple[str, ...]) -> Shard | None:
    if source == "srun" and "SLURM_JOB_ID" in environ:
        steps = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS")
        if not any(name in environ for name in steps):
            return None  # the batch script itself: SLURM_PROCID is 0 and nobody else runs
    rank = next((n for n in ranks if environ.get(n)), None)
    world = next((n for n in worlds if environ.get(n)), None)
    if rank is None and world is None:
        return None
    if rank is None or world is None:
        if source == "srun":  # salloc's shell has the job's variables and no rank
            return None
        have, lacks = (rank, worlds[0]) if rank else (world, ranks[0])
        raise ValueError(f"{have} is set and {lacks} is not: set both, unset both, or give --shard I/N")
    try:
        numbers = int(environ[rank]), int(environ[world])
    except ValueError:
        raise ValueError(
            f"{rank} is {environ[rank]!r} and {world} is {environ[world]!r}: integers are needed; unset them, or give "
            "--shard I/N"
        ) from None
    return _checked(*numbers, source, f" ({rank}, {world})")


def _checked(rank: int, world: int, source: str, names: str = "") -> Shard:
    if not 0 <= rank < world:
        raise ValueError(
            f"{source} says rank {rank} of {world}{names}: a rank is from 0 to the number of processes - 1"
        )
    return Shard(rank, world, source)


def _contradiction(one: Shard, other: Shard) -> ValueError:
    return ValueError(
        f"{one.source} says rank {one.rank} of {one.world}, {other.source} says rank {other.rank} of {other.world}: "
        "leave out --shard under a launcher, or unset the variables that are not meant"
    )
