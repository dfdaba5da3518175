"""Teachers that are averages of the student's own past weights."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from potstill.arguments import check_choice

ORDERS = ("before", "after")


class _Average(nn.Module):
    """A frozen copy of `student` in evaluation mode whose weights some rule makes; calling it runs that copy.

    Averages are kept in fp32 where the weights have 16 bits: a step of (1 - momentum) is below their rounding, and an
    average in bf16 stands still.
    """

    student: nn.Module

    def __init__(self, student: nn.Module, order: str) -> None:
        super().__init__()
        check_choice("order", order, ORDERS)
        self.order = order
        self.updates = 0
        self.teacher = copy.deepcopy(student).requires_grad_(False).eval()
        self.__dict__["student"] = student  # not a submodule: the student's weights are not part of this state
        self.masters = {name: p.detach().float() for name, p in self.teacher.named_parameters() if p.dtype.itemsize < 4}

    def train(self, mode: bool = True) -> _Average:
        """The teacher stays in evaluation mode, whatever it is a part of."""
        self.training = mode
        return self

    def _pairs(self) -> Iterable[tuple[str, Tensor, Tensor]]:
        """name, average (fp32 or wider), student's weight."""
        given = dict(self.student.named_parameters())
        for name, p in self.teacher.named_parameters():
            if name in self.masters:
                self.masters[name] = self.masters[name].to(p.device)
            yield name, self.masters.get(name, p), given[name].detach()

    @torch.no_grad()
    def update(self) -> None:
        """Takes the student's weights of now into the average; buffers are copied."""
        self.updates += 1
        self._take()
        weights = dict(self.teacher.named_parameters())
        for name, master in self.masters.items():
            weights[name].copy_(master)
        given = dict(self.student.named_buffers())
        for name, buffer in self.teacher.named_buffers():
            buffer.copy_(given[name])

    def _take(self) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The teacher's outputs, without gradient. In training mode the average is updated once: see `order`."""
        if self.training and self.order == "before":
            self.update()
        found = self.teacher(*args, **kwargs)
        if self.training and self.order == "after":
            self.update()
        return found

    def get_extra_state(self) -> dict[str, Any]:
        return {"updates": self.updates, "masters": self.masters}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for name, master in state["masters"].items():
            self.masters[name].copy_(master)


class EMA(_Average):
    """t <- momentum * t + (1 - momentum) * s, beginning with t = s.

    momentum: a number in [0, 1], or a function of the update's number (from 0) for a ramp.
    order: "before": calling the teacher first takes in the student's weights of that moment, as ALBEF does
        (arXiv:2107.07651, momentum 0.995, read in the authors' code); "after": it is called as it was and then updated,
        so that it lags one step more. In evaluation mode a call updates nothing; `update()` does it by hand.
    """

    def __init__(
        self, student: nn.Module, momentum: float | Callable[[int], float] = 0.995, *, order: str = "before"
    ) -> None:
        if not callable(momentum) and not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum} must lie in [0, 1]")
        super().__init__(student, order)
        self.momentum = momentum

    def _take(self) -> None:
        m = self.momentum(self.updates - 1) if callable(self.momentum) else self.momentum
        for _, average, given in self._pairs():
            average.lerp_(given.to(average.dtype), 1 - m)


class WindowMean(_Average):
    """The mean of the student's last w states; before any update, the student as it was.

    window: w, or a function of the update's number (from 0) for one that grows. A state once dropped does not come
        back: where the window grows by n, it holds n more from there on. Memory: w copies of the weights.
    order: as in EMA.
    The local mean teacher of OGEN, arXiv:2401.15914 (from memory: the released trainer has no window rule).
    """

    def __init__(self, student: nn.Module, window: int | Callable[[int], int] = 5, *, order: str = "before") -> None:
        if not callable(window) and window < 1:
            raise ValueError(f"window={window} must hold at least one state")
        super().__init__(student, order)
        self.window = window
        self.states: deque[dict[str, Tensor]] = deque()

    def _take(self) -> None:
        size = self.window(self.updates - 1) if callable(self.window) else self.window
        if size < 1:
            raise ValueError(f"window gave {size} at update {self.updates - 1}; at least one state is needed")
        self.states.append({name: given.clone() for name, _, given in self._pairs()})
        while len(self.states) > size:
            self.states.popleft()
        for name, average, _ in self._pairs():
            total = torch.zeros_like(average)
            for state in self.states:
                total += state[name].to(average.dtype)
            average.copy_(total / len(self.states))

    def get_extra_state(self) -> dict[str, Any]:
        return {**super().get_extra_state(), "states": list(self.states)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.states = deque(state["states"])
