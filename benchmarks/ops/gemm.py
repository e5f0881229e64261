"""Matrix products of Llama-3.1-8B's layers as the engine shapes them: how much a border of adapter columns costs.

With a border of R, forward is [x, z] [T, K + R] times [[W, B]] [N, K + R] transposed, and backward [dy, dz] [T, N + R]
times [[W], [A]] [N + R, K]. TFLOP/s count the product without its border, so that they compare. Run alone it prints.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gazelle.kernels.fp8 import fp8_supported, quantize_rows, scaled_mm

T = 8192
SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))  # N x K: qkv, o, gate and up, down
BORDERS = (0, 16, 48, 64)
RANKS = (16, 32, 48, 64)


def case(name: str, flops: float, run: Callable[..., Any], *args: Any, **options: Any) -> dict[str, Any]:
    import triton

    ms = triton.testing.do_bench(lambda: run(*args, **options), warmup=5, rep=20, return_mode="median")
    return {"op": "gemm", "case": name, "ms": ms, "tflops": flops / ms / 1e9}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def cases() -> Iterator[dict[str, Any]]:
    """{"op", "case", "ms", "tflops"}; nothing without a GPU."""
    if not torch.cuda.is_available():
        return
    for N, K in SHAPES:
        yield from bordered(N, K)
        if fp8_supported(torch.device("cuda")):
            yield from eight_bits(N, K)
    for K in (4096, 14336, 28672):
        yield from thin(K)


def bordered(N: int, K: int) -> Iterator[dict[str, Any]]:
    flops, name = 2.0 * T * N * K, f"{N}x{K}"
    residual = random(T, N)
    for R in BORDERS:
        W, x, dy = random(N + R, K + R), random(T, K + R), random(T, N + R)
        yield case(f"{name} forward, border {R}", flops, torch.mm, x, W[:N].t())
        yield case(f"{name} backward, border {R}", flops, torch.mm, dy, W[:, :K])
        if N == 4096:
            yield case(f"{name} forward onto a residual, border {R}", flops, torch.addmm, residual, x, W[:N].t())
    R = 16
    W, A, B = random(N, K), random(R, K), random(N, R)
    x, z, dz, dy = random(T, K), random(T, R), random(T, R), random(T, N)
    yield case(f"{name} forward, then {R} columns added", flops, lambda: torch.mm(x, W.t()).addmm_(z, B.t()))
    yield case(f"{name} backward, then {R} columns added", flops, lambda: torch.mm(dy, W).addmm_(dz, A))
    yield case(f"{name} forward into rows that lie apart", flops, torch.mm, x, W.t(), out=random(T, N + 64)[:, :N])


def eight_bits(N: int, K: int) -> Iterator[dict[str, Any]]:
    flops, name = 2.0 * T * N * K, f"{N}x{K}"
    for way, n, k in (("forward", N, K), ("backward", K, N)):
        x, scale = quantize_rows(random(T, k))
        weight, row_scales = quantize_rows(random(n, k))
        yield case(f"{name} {way}, fp8", flops, scaled_mm, x, weight, scale, row_scales.flatten(), torch.bfloat16)


def thin(K: int) -> Iterator[dict[str, Any]]:
    x = random(T, K + 64)[:, :K]
    for R in RANKS:
        A, B, z, border = random(R, K), random(K, R), random(T, R), random(T, R + K)
        flops, name = 2.0 * T * K * R, f"{R} of {K}"
        yield case(f"{name} x Aᵀ", flops, torch.mm, x, A.t())
        yield case(f"{name} x Aᵀ into the border", flops, torch.mm, x, A.t(), out=border[:, K:])
        yield case(f"{name} dy B", flops, torch.mm, x, B)
        yield case(f"{name} dyᵀ z", flops, torch.mm, x.t(), z)
        yield case(f"{name} dyᵀ z in float32", flops, torch.mm, x.t(), z, out_dtype=torch.float32)
        yield case(f"{name} dzᵀ x", flops, torch.mm, z.t(), x)
        yield case(f"{name} dzᵀ x in float32", flops, torch.mm, z.t(), x, out_dtype=torch.float32)


if __name__ == "__main__":
    for result in cases():
        print(f"{result['case']:50} {result['ms']:9.4f} ms {result['tflops']:8.1f} TFLOP/s", flush=True)
