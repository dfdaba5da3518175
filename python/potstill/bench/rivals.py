"""The distillation losses of other packages, imported from them as installed; what is absent or cannot run says so.

    potstill bench losses        needs `pip install "potstill[rivals]"` for the rows of this module

Forward KL(teacher || student) from hidden states: Liger-Kernel's chunked loss in plain torch (beta=0), uncompiled and
compiled, and TRL's chunked divergence (beta=0). Neither has a loss from cached top-k rows.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from potstill.bench.cases import CHUNK, Case, Loss

PACKAGES = {"Liger": "liger-kernel", "TRL": "trl"}


def version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def compiled_eager(case: Case) -> Loss:
    """torch.compile of the eager loss."""
    faster = torch.compile(case.plain)
    teacher = case.teacher if case.th is None else (case.th, case.tw)
    return lambda: faster(case.h, case.w, teacher)


def liger(case: Case, compiled: bool) -> Loss:
    """LigerFusedLinearJSDLoss with beta=0, which is forward KL, in chunks as long as the floor's."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled, chunk_size=CHUNK
    )
    labels = torch.zeros(case.shape.rows, dtype=torch.int64)
    return lambda: loss(case.h, case.w, case.th, case.tw, labels)


def trl_chunked(case: Case) -> Loss:
    """TRL's ChunkedDivergenceFunction with beta=0, forward KL: vocabulary tiles, products again in backward."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss() -> Tensor:
        rows, _ = ChunkedDivergenceFunction.apply(case.h, case.w, None, case.th, case.tw, None, 0.0)
        return rows.mean()

    return loss


def found(case: Case, compiled: bool = True) -> tuple[dict[str, Loss], dict[str, str]]:
    """({name: loss}, {name: why it is not measured}) of the rivals for this case."""
    wanted: dict[str, Callable[[], Loss]] = {}
    if compiled:
        wanted["torch.compile"] = lambda: compiled_eager(case)
        if case.shape.dtype in ("bfloat16", "float16"):
            wanted["torch.compile on fp32 copies"] = lambda: torch.compile(case.eager_widened)
    if case.shape.form == "dense":
        wanted["Liger chunked"] = lambda: liger(case, False)
        if compiled:
            wanted["Liger chunked, compiled"] = lambda: liger(case, True)
        wanted["TRL chunked"] = lambda: trl_chunked(case)
    losses: dict[str, Loss] = {}
    skipped: dict[str, str] = {}
    if case.shape.form == "sparse":
        skipped["Liger, TRL"] = "neither has a loss from cached top-k teacher rows"
    for name, make in wanted.items():
        package = PACKAGES.get(name.split()[0])
        if package is not None and version(package) is None:
            skipped[name] = f"the package {package} is not installed"
            continue
        try:
            losses[name] = make()
        except Exception as error:  # a rival may fail in any way where its own requirements are not met
            skipped[name] = f"{package or 'torch'} cannot run here: {type(error).__name__}: {error}"
    return losses, skipped


def versions() -> dict[str, Any]:
    """{"liger-kernel": "0.8.5", ...} of what is installed."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return {package: v for package in PACKAGES.values() if (v := version(package)) is not None}
