"""Op calls recorded once and replayed: what a frozen module runs instead of its Python."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: A function of a list of tensors to the inputs of the next one.
Stage: TypeAlias = "Callable[[list[Tensor]], list[Tensor]]"


class _Slot(int):
    """Where a tensor of a call is kept during a replay."""


class _Maps(list[Any]):
    """A list argument that holds a slot."""


class _Step(NamedTuple):
    """One operator call: its arguments with slots in the place of tensors."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    used: set[int]
    results: range  # its slots
    last: tuple[int, ...] = ()  # slots that no later step uses


def _address(x: Tensor) -> int | None:
    """Where the memory of ``x`` begins, by whichever tensor it is reached; None without memory."""
    return x.untyped_storage().data_ptr() or None


class Plan:
    """The operator calls of a function of tensors, to be repeated on tensors like those it saw.

    Tensors that are neither inputs nor results of an earlier call (weights) are constants. A plan
    is right for inputs of the same shapes, dtypes and device, as long as the function takes the
    same path; it holds its constants alive.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self._slots = {id(x): _Slot(i) for i, x in enumerate(inputs)}
        # neither an id nor an address means anything once its tensor is gone
        self._alive: list[Any] = list(inputs)
        self._addresses = set(map(_address, inputs))
        self._steps: list[_Step] = []
        self._count = len(inputs)
        self._outputs: list[_Slot] = []
        #: Why the calls cannot be repeated; None when they can.
        self.refusal: str | None = None

    def _template(self, value: Any, used: set[int]) -> Any:
        if isinstance(value, Tensor):
            slot = self._slots.get(id(value))
            if slot is not None:
                used.add(slot)
                return slot
            if _address(value) in self._addresses:
                self.refusal = self.refusal or "an argument is another view of a recorded tensor"
            return value
        if isinstance(value, (list, tuple)):
            values = [self._template(v, used) for v in value]
            if any(type(v) is _Maps for v in values):
                self.refusal = self.refusal or "a list of lists holds a tensor"
            return _Maps(values) if any(type(v) is _Slot for v in values) else values
        return value

    def _add(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        results = list(result) if isinstance(result, (list, tuple)) else [result]
        pure = not func._schema.is_mutable and torch.Tag.nondeterministic_seeded not in func.tags
        if not pure or not all(isinstance(r, Tensor) for r in results):
            self.refusal = self.refusal or f"{func} is not a function of tensors to tensors"
            return
        self._alive += results
        if len(results) == 1 and any(results[0] is a for a in args):
            return  # for example a conversion to the dtype it has
        used: set[int] = set()
        template = tuple(self._template(a, used) for a in args)
        if any(isinstance(value, Tensor) for value in kwargs.values()):
            self.refusal = self.refusal or f"{func} has a tensor as a named argument"
        if not used:
            return  # computed from weights alone: the results are constants too
        first = self._count
        self._count += len(results)
        for i, r in enumerate(results):
            self._slots[id(r)] = _Slot(first + i)
            self._addresses.add(_address(r))
        self._steps.append(_Step(func, template, kwargs, used, range(first, self._count)))

    def _finish(self, outputs: Sequence[Tensor]) -> None:
        try:
            self._outputs = [self._slots[id(x)] for x in outputs]
        except KeyError:
            self.refusal = self.refusal or "an output is not the result of an operator"
        needed = set(self._outputs)
        steps = []
        for step in reversed(self._steps):
            if not needed.isdisjoint(step.results):
                slots = step.used.union(step.results)
                steps.append(step._replace(last=tuple(slots - needed)))
                needed |= step.used
        self._steps = steps[::-1]
        self._slots, self._alive, self._addresses = {}, [], set()

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The function's results for ``inputs``."""
        known: list[Any] = [*inputs, *[None] * (self._count - len(inputs))]
        with torch._C._AutoDispatchBelowAutograd():  # where the calls were recorded
            for func, args, kwargs, _, results, last in self._steps:
                filled: Any = [
                    known[a]
                    if type(a) is _Slot
                    else [known[v] if type(v) is _Slot else v for v in a]
                    if type(a) is _Maps
                    else a
                    for a in args
                ]
                result = func(*filled, **kwargs)
                if isinstance(result, Tensor):
                    known[results.start] = result
                else:
                    known[results.start : results.stop] = result
                for slot in last:  # memory that is free again is still in the cache
                    known[slot] = filled = result = None
        return [known[slot] for slot in self._outputs]


class _Recorder(TorchDispatchMode):
    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True, the default, imports torch.compile's machinery: 130 MiB and a second

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.plan._add(func, args, kwargs or {}, result)
        return result


def record(
    function: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor]
) -> tuple[list[Tensor], Plan]:
    """Runs ``function``, which computes from ``inputs``; its results and the plan of its calls."""
    plan = Plan(inputs)
    with _Recorder(plan):
        outputs = list(function())
    plan._finish(outputs)
    return outputs, plan


class CallList:
    """The operator calls of stages that follow one another, for inputs like those it was made with.

    It holds no memory for maps and can be used by several threads at once.

    Args:
        stages: each gets the list that the one before returned. One whose calls cannot be repeated
            runs as it is.
        inputs: of the first stage.
    """

    def __init__(self, stages: Sequence[Stage], inputs: list[Tensor]) -> None:
        self._stages: list[Stage | Plan] = []
        for stage in stages:
            inputs, plan = record(partial(stage, inputs), inputs)
            self._stages.append(stage if plan.refusal else plan)

    def __call__(self, inputs: list[Tensor]) -> tuple[list[Tensor], list[float]]:
        """The last stage's result, and the seconds that each stage took."""
        seconds = []
        for stage in self._stages:
            start = time.perf_counter()
            inputs = stage(inputs)
            seconds.append(time.perf_counter() - start)
        return inputs, seconds


_Planned = TypeVar("_Planned")


class Plans(Generic[_Planned]):
    """Plans by what they are for, those used last; several threads may share them.

    Args:
        most: keys that are kept. One may be known without a plan.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._known: OrderedDict[Hashable, _Planned | None] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def values(self) -> list[_Planned]:
        """The plans there are, the one used last at the end."""
        with self._lock:
            return [plan for plan in self._known.values() if plan is not None]

    def find(self, key: Hashable) -> tuple[bool, _Planned | None]:
        """Whether ``key`` is known, and its plan if it has one; counts as a use."""
        with self._lock:
            if key not in self._known:
                return False, None
            self._known.move_to_end(key)
            return True, self._known[key]

    def keep(self, key: Hashable, plan: _Planned | None) -> None:
        """Makes ``key`` known; too many, and the one not used for longest is forgotten."""
        with self._lock:
            self._known[key] = plan
            self._known.move_to_end(key)
            while len(self._known) > self.most:
                self._known.popitem(last=False)

    def clear(self) -> None:
        """Forgets all keys."""
        with self._lock:
            self._known.clear()
