"""What files of this folder share: where they run, the clock, and whom else they measure."""

import functools
import importlib
import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gazelle.kernels.factors import Factors

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


def random(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=DEVICE)


def adapters(outputs: Sequence[int], inputs: int, rank: int = 16) -> list[Factors]:
    """One adapter for each part of a projection, whose outputs lie one after another."""
    rows = itertools.pairwise(itertools.accumulate(outputs, initial=0))
    return [Factors(random(rank, inputs).float(), random(end - begin, rank).float(), 2.0, slice(begin, end),
                    slice(number * rank, number * rank + rank)) for number, (begin, end) in enumerate(rows)]


def case(op: str, name: str, size: int, run: Callable[..., Any], *args: Any, **options: Any) -> dict[str, Any]:
    """One measured case; `size` is how many bytes have to be read and written."""
    ms = milliseconds(functools.partial(run, *args, **options))
    return {"op": op, "case": name, "ms": ms, "gb_s": size / ms / 1e6}


def milliseconds(run: Callable[[], Any]) -> float:
    """Median of some runs; on a CPU, whose cores others may be using, the fastest."""
    if ON_GPU:
        import triton

        return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
    run()
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begun < 0.2:
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return min(times)


def peers(eager: Callable[..., Any], liger: str, **options: Any) -> dict[str, Callable[..., Any]]:
    """An op in plain PyTorch, and on a GPU the same compiled and Liger's, where that is installed.

    Args:
        eager: the op in plain PyTorch.
        liger: name of Liger's in `liger_kernel.transformers.functional`.
        options: for Liger's.
    """
    found = {"eager": eager}
    if ON_GPU:
        # A compiled backward pass may otherwise run but once.
        importlib.import_module("torch._functorch.config").donated_buffer = False
        found["compiled"] = torch.compile(eager, dynamic=False)
    if ON_GPU and importlib.util.find_spec("liger_kernel") is not None:
        module = importlib.import_module("liger_kernel.transformers.functional")
        found["liger"] = functools.partial(getattr(module, liger), **options)
    return found


def forward_and_backward(op: str, name: str, functions: Mapping[str, Callable[..., Any]], inputs: Sequence[Any],
                         grads: Sequence[Tensor], sizes: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Two cases for each function: its forward pass, and its backward pass alone, for those inputs that ask for it."""
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    for label, function in functions.items():
        yield case(op, f"{name} forward, {label}", sizes[0], function, *inputs)
        out = function(*inputs)
        yield case(op, f"{name} backward, {label}", sizes[1], torch.autograd.grad, out, wanted, list(grads),
                   retain_graph=True)


def line(result: Mapping[str, Any], width: int = 60) -> str:
    """A result as a row of the table. Some ops count bytes, some operations."""
    rates = [f"{result[key]:8.1f} {unit}" for key, unit in (("gb_s", "GB/s"), ("tflops", "TFLOP/s")) if key in result]
    return f"{result['case']:{width}} {result['ms']:10.4f} ms {' '.join(rates)}"


def show(cases: Iterator[dict[str, Any]]) -> None:
    for result in cases:
        print(line(result), flush=True)
