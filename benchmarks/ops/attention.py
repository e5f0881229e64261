"""Attention of every backend on the shapes that training meets: time forward and backward, error, repeatability.

Run alone it prints; `cases` is for the runner. cuDNN's kernel for packed rows is measured here and used nowhere: torch
before 2.13 or so gives its backward pass the head size for the longest row, which reads and writes past the end for
longer rows (https://github.com/pytorch/pytorch/pull/186142), and builds its plan anew at each call. It runs last and in
a process of its own, since an error there would end this one.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gazelle.kernels.attention import Rows, attention


@dataclass(frozen=True)
class Shape:
    name: str
    sizes: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    backends: tuple[str, ...]
    uniform: bool = True
    window: int | None = None
    softcap: float | None = None
    dtype: torch.dtype = torch.bfloat16

    @property
    def flops(self) -> float:
        """Of the forward pass; the backward pass has 2.5 times as many."""
        seen = sum(sum(min(i + 1, self.window or n) for i in range(n)) for n in self.sizes)
        return 4.0 * seen * self.heads * self.head_dim

    def rows(self, device: str) -> Rows:
        if self.uniform:
            return Rows(len(self.sizes), self.sizes[0], uniform=True)
        starts = torch.tensor([0, *self.sizes]).cumsum(0, dtype=torch.int32).to(device)
        return Rows(len(self.sizes), max(self.sizes), cu_seqlens=starts,
                    sizes=self.sizes if device == "cpu" else None)


def lengths(total: int, around: int) -> tuple[int, ...]:
    """Lengths between a third and five thirds of `around` that add up to `total`."""
    generator = torch.Generator().manual_seed(0)
    found: list[int] = []
    while sum(found) < total:
        found.append(int(torch.randint(around // 3, around * 5 // 3, (1,), generator=generator)))
    found[-1] -= sum(found) - total
    return tuple(found)


PACKED = lengths(8192, 150)
GPU = (
    Shape("8B 4x2048", (2048,) * 4, 32, 8, 128, ("cudnn", "flash", "varlen", "flex", "sdpa")),
    Shape("8B 8192 in rows of ~150", PACKED, 32, 8, 128, ("varlen", "cudnn", "sdpa", "reference"), False),
    Shape("8B 8192 in rows of ~1000", lengths(8192, 1000), 32, 8, 128, ("varlen", "cudnn"), False),
    Shape("8B 1x65536", (65536,), 32, 8, 128, ("cudnn", "flash")),
    Shape("SmolLM2 8x512", (512,) * 8, 9, 3, 64, ("cudnn", "flash", "varlen", "sdpa", "reference")),
    Shape("Mistral-like 2x8192, window 4096", (8192,) * 2, 32, 8, 128, ("varlen", "sdpa"), window=4096),
    Shape("Gemma-2-like 1x8192, softcap, window 4096", (8192,), 8, 4, 256, ("flex",), window=4096, softcap=50.0),
    Shape("Gemma-like 4x2048, D=256", (2048,) * 4, 8, 4, 256, ("cudnn", "flash")),
    Shape("8B 4x2048, float32", (2048,) * 4, 32, 8, 128, ("sdpa",), dtype=torch.float32),
)
CPU = (
    Shape("SmolLM2 8 rows of ~60, float32", (64, 66, 42, 56, 72, 71, 65, 59), 9, 3, 64, ("auto", "sdpa", "reference"),
          False, dtype=torch.float32),
    Shape("SmolLM2 4x256, float32", (256,) * 4, 9, 3, 64, ("auto", "sdpa", "reference"), dtype=torch.float32),
)


def cases() -> Iterator[dict[str, Any]]:
    """{"op", "case", "ms", "tflops"}, forward and backward for each shape and backend; what fails is printed."""
    gpu = torch.cuda.is_available()
    for shape in GPU if gpu else CPU:
        for backend in shape.backends:
            try:
                yield from measure(shape, backend, "cuda" if gpu else "cpu")
            except (RuntimeError, ValueError, NotImplementedError) as error:
                print(f"attention, {shape.name}, {backend}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            if gpu:
                torch.cuda.empty_cache()
    if gpu:
        yield from cudnn_varlen_cases()


def inputs_for(shape: Shape, device: str) -> tuple[list[Tensor], Tensor]:
    """q, k, v as views of one buffer, and the gradient of the output."""
    torch.manual_seed(0)
    T, heads = sum(shape.sizes), (shape.heads, shape.kv_heads, shape.kv_heads)
    buffer = torch.randn(T, sum(heads) * shape.head_dim, device=device).to(shape.dtype)
    parts = buffer.split([n * shape.head_dim for n in heads], 1)
    grad = torch.randn(T, shape.heads, shape.head_dim, device=device).to(shape.dtype)
    return [part.unflatten(1, (-1, shape.head_dim)).detach().requires_grad_() for part in parts], grad


def measure(shape: Shape, backend: str, device: str) -> Iterator[dict[str, Any]]:
    inputs, grad = inputs_for(shape, device)
    rows = shape.rows(device)

    def forward() -> Tensor:
        return attention(*inputs, rows, shape.head_dim**-0.5, shape.window, shape.softcap, backend=backend)

    yield from timed(shape, backend, forward, inputs, grad)
    if backend != "flex" or shape.softcap is not None:  # flex compiles for each shape, which takes seconds
        print(f"    {backend}: error against float32 {error_of(shape, backend, device)}", flush=True)


def timed(shape: Shape, backend: str, forward: Callable[[], Tensor], inputs: list[Tensor], grad: Tensor
          ) -> Iterator[dict[str, Any]]:
    started = time.perf_counter()
    out = forward()

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, grad, retain_graph=True)

    first = backward()
    wait(out)
    started = time.perf_counter() - started
    for name, run, flops in (("forward", forward, shape.flops), ("backward", backward, 2.5 * shape.flops)):
        ms = milliseconds(run, out)
        yield {"op": "attention", "case": f"{shape.name}, {backend}, {name}", "ms": ms, "tflops": flops / ms / 1e9}
    same = all(torch.equal(x, y) for _ in range(3) for x, y in zip(first, backward(), strict=True))
    found = "repeats" if same else "DIFFERS from run to run"
    print(f"    {backend}: first call {started:.1f} s, backward {found}", flush=True)
    if not same:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        try:
            first, ms = backward(), milliseconds(backward, out)
            same = all(torch.equal(x, y) for _ in range(3) for x, y in zip(first, backward(), strict=True))
            yield {"op": "attention", "case": f"{shape.name}, {backend}, backward, deterministic"
                   f"{'' if same else ' (and yet differs)'}", "ms": ms, "tflops": 2.5 * shape.flops / ms / 1e9}
        finally:
            torch.use_deterministic_algorithms(False)


def milliseconds(run: Callable[[], Any], on: Tensor) -> float:
    """Median of some runs, each timed on the device; on a GPU the L2 cache is cleared between them."""
    run()
    wait(on)
    times = []
    flush = torch.empty(2**27, dtype=torch.int8, device=on.device) if on.is_cuda else None
    begun = time.perf_counter()
    while len(times) < 3 or (len(times) < 10 and time.perf_counter() - begun < 1.0):
        if flush is None:
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
        else:
            flush.zero_()  # it also hides the time that the host takes to launch
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def wait(on: Tensor) -> None:
    if on.is_cuda:
        torch.cuda.synchronize()


def error_of(shape: Shape, backend: str, device: str) -> str:
    """The largest difference of output and gradients, on a few rows of the shape cut to 300 tokens."""
    sizes = tuple(min(n, 300) for n in shape.sizes[:8])
    window = None if shape.window is None else 70
    small = replace(shape, sizes=sizes, window=window)
    exact = replace(small, dtype=torch.float32)
    results = []
    for case, name in ((small, backend), (exact, "reference")):
        inputs, grad = inputs_for(case, device)
        inputs = [x.detach().to(shape.dtype).to(case.dtype).requires_grad_() for x in inputs]
        grad = grad.to(shape.dtype).to(case.dtype)
        out = attention(*inputs, case.rows(device), case.head_dim**-0.5, window, case.softcap, backend=name)
        results.append((out.detach(), *torch.autograd.grad(out, inputs, grad)))
    errors = [(x.float() - y).abs().max() / y.abs().max() for x, y in zip(*results, strict=True)]
    return " ".join(f"{name} {float(error):.1e}" for name, error in zip(("out", "dq", "dk", "dv"), errors, strict=True))


def cudnn_varlen(inputs: list[Tensor], starts: Tensor, longest: int, scale: float) -> Tensor:
    # Contiguous: its backward pass writes gradients with the strides of its inputs into dense tensors.
    q, k, v = (x.contiguous() for x in inputs)
    return torch.ops.aten._cudnn_attention_forward(q, k, v, None, starts, starts, longest, longest, True, 0.0, True,
                                                   False, scale=scale)[0]


def cudnn_varlen_cases() -> Iterator[dict[str, Any]]:
    try:
        done = subprocess.run([sys.executable, __file__, "cudnn_varlen"], capture_output=True, text=True, timeout=60,
                              check=False)
    except subprocess.TimeoutExpired:
        print("attention, cudnn_varlen: no end after 60 s")
        return
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            yield json.loads(line)
        else:
            print(line)
    if done.returncode:
        print("attention, cudnn_varlen:", done.stderr[-600:])


def cudnn_varlen_alone() -> None:
    # No row is longer than the head size, so that the backward pass stays inside its buffers in any torch.
    shape = Shape("8B 8192 in rows of ~75", lengths(8192, 75), 32, 8, 128, (), False)
    inputs, grad = inputs_for(shape, "cuda")
    starts, longest, scale = shape.rows("cuda").starts(grad.device), max(shape.sizes), shape.head_dim**-0.5
    assert longest <= shape.head_dim
    for name, run in (("cudnn_varlen", lambda: cudnn_varlen(inputs, starts, longest, scale)),
                      ("varlen", lambda: attention(*inputs, shape.rows("cuda"), scale, backend="varlen"))):
        for result in timed(shape, name, run, inputs, grad):
            print(json.dumps(result), flush=True)
    ours, theirs = (torch.autograd.grad(out, inputs, grad) for out in (
        cudnn_varlen(inputs, starts, longest, scale), attention(*inputs, shape.rows("cuda"), scale, backend="varlen")))
    differences = [float((x - y).norm() / y.norm()) for x, y in zip(ours, theirs, strict=True)]
    print("    cudnn_varlen against varlen, relative:", " ".join(f"{x:.1e}" for x in differences))


if __name__ == "__main__":
    if sys.argv[1:] == ["cudnn_varlen"]:
        cudnn_varlen_alone()
    else:
        for result in cases():
            print(f"{result['case']:62} {result['ms']:9.3f} ms {result['tflops']:7.2f} TFLOP/s", flush=True)
