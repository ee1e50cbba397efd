"""Every operator that torch runs, in order, with the bits of what it takes and gives."""

from __future__ import annotations

import hashlib
import linecache
import os
import sys
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode

import launcher
from launcher.edges.batch import is_dense

TORCH = os.path.dirname(torch.__file__) + os.sep
LAUNCHER = os.path.dirname(launcher.__file__) + os.sep
# What a user writes, though it ships with the launcher.
WRITTEN = tuple(LAUNCHER + room + os.sep for room in ("tasks", "datasets"))
AT_ONCE = 1 << 22  # numbers of a tensor that are summed at a time
# These leave memory as it is; `fill` puts something there.
LEAVE = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
# These write over a tensor, or over a part of it, without reading what is there.
OVERWRITE = {
    *("copy_", "fill_", "zero_", "set_", "resize_", "index_put_", "index_copy_", "index_fill_"),
    *("scatter_", "masked_fill_", "masked_scatter_", "_foreach_copy_", "_foreach_zero_"),
    *("normal_", "uniform_", "random_", "bernoulli_", "exponential_", "log_normal_", "cauchy_"),
    *("geometric_", "_index_put_impl_"),
}
Line = tuple[str, int, str]  # file, line, function


class Event(NamedTuple):
    """One operator's call: digests of what it takes and of what it gives, and where it was."""

    name: str
    takes: tuple[Any, ...]
    gives: tuple[Any, ...]
    stage: str  # "forward", "backward" or "update"
    module: str
    line: Line | None
    forward: tuple[str, ...]  # in a backward pass, the stack of its forward pass
    random: bool  # it draws random numbers
    judged: bool  # what it gives is all made of what it takes, uninitialised memory included


class Operators(TorchDispatchMode):
    """While it is on, `events` grows by each operator, those of backward passes included. A CUDA
    tensor's digest is waited for: this is for a few steps alone."""

    def __init__(self, model: nn.Module, step: Any, fill: int) -> None:
        """`step` are the modules that a forward pass begins with; `fill` is put into memory that is
        left as it was."""
        super().__init__()
        self.names = {id(m): name for name, m in model.named_modules()}
        self.steps, self.fill = {id(m) for m in step}, fill
        self.events: list[Event] = []
        self.running: list[tuple[str, int]] = []  # modules, each with its first autograd node
        self.spans: list[tuple[int, int, str]] = []  # of autograd nodes, by module
        # torch fills it itself then, if its users want that.
        fills: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        self.fills = not (torch.are_deterministic_algorithms_enabled() and fills)

    def __enter__(self) -> Any:
        self.handles = [
            hooks.register_module_forward_pre_hook(self._begin),
            hooks.register_module_forward_hook(self._end, always_call=True),
        ]
        self.anomaly = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
        # It keeps, with each node of autograd, the stack that made it.
        torch.autograd.set_detect_anomaly(True, check_nan=self.anomaly == (True, True))
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        torch.autograd.set_detect_anomaly(*self.anomaly)
        for handle in self.handles:
            handle.remove()

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self.running.append((self._named(module), torch.autograd._get_sequence_nr()))

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        name, first = self.running.pop()
        self.spans.append((first, torch.autograd._get_sequence_nr(), name))

    def _named(self, module: nn.Module) -> str:
        kind = type(module).__name__
        if id(module) in self.steps:
            return ""
        if id(module) not in self.names:
            return f"a {kind} outside of the model"
        name = self.names[id(module)]
        return f"{name} ({kind})" if name else f"the model itself ({kind})"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        takes = tuple(digests([*args, *kwargs.values()]))
        given = func(*args, **kwargs)
        schema = func._schema
        if name in LEAVE:
            if self.fills and is_dense(given) and not given.is_meta:
                given.fill_(self.fill)
            gives: tuple[Any, ...] = ()
        else:
            # What is written in place is given as well, whether or not it is returned.
            written = [
                args[i] if i < len(args) else kwargs.get(a.name)
                for i, a in enumerate(schema.arguments)
                if a.alias_info is not None and a.alias_info.is_write
            ]
            gives = tuple(digests([given, *(one for one in written if one is not given)]))
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        node = torch._C._current_autograd_node()
        line = written_at(sys._getframe(1))
        if node is None:
            stage = "forward" if self.running else "update"
            module, forward = self.running[-1][0] if self.running else "", ()
        else:
            stage = "backward"
            module = self._module_of(node)
            forward = tuple(getattr(node, "metadata", {}).get("traceback_", ()))
        self.events.append(
            Event(
                str(func),
                takes,
                gives,
                stage,
                module,
                line,
                forward,
                torch.Tag.nondeterministic_seeded in func.tags,
                not view and name not in LEAVE and name not in OVERWRITE,
            )
        )
        return given

    def _module_of(self, node: Any) -> str:
        """The innermost module in whose forward pass a node of autograd was made."""
        number = node._sequence_nr()
        inside = ((last - first, i) for i, (first, last, _) in enumerate(self.spans)
                  if first <= number < last)  # fmt: skip
        found = min(inside, default=None)
        return self.spans[found[1]][2] if found else ""


def written_at(frame: Any) -> Line | None:
    """The user's line that is at work: the innermost one that is neither torch's nor the
    launcher's; None where the launcher itself is."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(LAUNCHER) and not file.startswith(WRITTEN):
            return None
        if not file.startswith(TORCH) and not file.startswith("<"):
            return file, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back
    return None


def line_of_stack(stack: Iterable[str]) -> Line | None:
    """The same, of a stack that autograd has kept as text, outermost first."""
    for text in reversed(list(stack)):
        head = text.strip().split("\n")[0]
        if not head.startswith('File "'):
            continue
        file, _, rest = head.removeprefix('File "').partition('", line ')
        number, _, function = rest.partition(", in ")
        if file.startswith(LAUNCHER) and not file.startswith(WRITTEN):
            return None
        if not file.startswith(TORCH) and not file.startswith("<") and number.isdigit():
            return file, int(number), function
    return None


def shown(line: Line) -> str:
    """A line with what stands there."""
    file, number, function = line
    code = linecache.getline(file, number).strip()
    return f"{file}:{number} in {function}" + (f": `{code}`" if code else "")


def digests(value: Any) -> Iterator[Any]:
    """Of all tensors, numbers and generators in arguments or results, in order."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from digests(item)
    elif isinstance(value, torch.Tensor):
        yield digest(value)
    elif isinstance(value, torch.Generator):
        yield "generator", digest(value.get_state())
    elif isinstance(value, float):
        yield value.hex()
    elif isinstance(value, (bool, int, complex, str)):
        yield value


def digest(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Type, shape, and a number that depends on each bit and its place. Waits for the device."""
    what = str(tensor.dtype), tuple(tensor.shape)
    if not is_dense(tensor) or tensor.is_meta or type(tensor).__name__ == "FakeTensor":
        return what
    return *what, int(row_digests(tensor.reshape(1, -1))[0])


def row_digests(tensor: torch.Tensor) -> list[int]:
    """The same for each row of a dense one of two dimensions."""
    if tensor.numel() == 0:
        return [0] * len(tensor)
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor).flatten(1)
    if tensor.device.type != "cpu":
        return sums(tensor)
    rows = tensor.contiguous().view(torch.uint8).numpy()
    return [int.from_bytes(hashlib.blake2b(row, digest_size=8).digest(), "big") for row in rows]


def sums(tensor: torch.Tensor) -> list[int]:
    """Of each row a sum that depends on each bit and its place, made on the device: a copy to the
    host would take far longer."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.contiguous().view(whole)
    total = torch.zeros(len(bits), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.shape[1], AT_ONCE):
        part = bits[:, start : start + AT_ONCE].to(torch.int64)
        # Odd factors lose no bit of a number; overflow wraps.
        place = torch.arange(start, start + part.shape[1], device=part.device) * 2 + 1
        total += (part * place + (part ^ place) * 0x9E3779B1).sum(1)
    return [int(number) for number in total.tolist()]  # waits for the device


def first_difference(
    first: list[Event], second: list[Event], judged: bool = False
) -> tuple[int, Event | None, Event | None] | None:
    """Where two records begin to differ: the place, and both calls there (None: it has ended). With
    `judged` only calls whose results are all made of what they take count."""
    for place, (a, b) in enumerate(zip_longest(first, second)):
        if a is None or b is None or a.name != b.name:
            return place, a, b
        if a.gives != b.gives if judged else (a.takes, a.gives) != (b.takes, b.gives):
            if judged and not a.judged:
                continue
            return place, a, b
    return None
