"""Everything around products in fp8: activations quantised by row, frozen weights written as rows or columns.

GB/s count what has to be read and written. Run alone it prints.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from gazelle.kernels import nf4
from gazelle.kernels.fp8 import fp8_supported, quantize_rows, scale_of
from gazelle.quantize.int8 import Int8
from gazelle.quantize.nf4 import NF4
from gazelle.quantize.storage import Dense, Storage

T = 8192
SHAPE = (28672, 4096)


def storages() -> Iterator[tuple[str, Storage]]:
    N, K = SHAPE
    blocks = N * K // 64
    packed = torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8, device="cuda")
    code = torch.linspace(-1, 1, 16, device="cuda")
    yield "nf4", NF4(packed, code, torch.rand(blocks, device="cuda") / 50, None, 64, SHAPE, torch.bfloat16)
    nested = nf4.Nested(torch.linspace(-1, 1, 256, device="cuda"), torch.rand(blocks // 256, device="cuda") / 50,
                        torch.tensor(0.02, device="cuda"), 256)
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device="cuda")
    yield "nf4 nested", NF4(packed, code, absmax, nested, 64, SHAPE, torch.bfloat16)
    yield "int8", Int8(torch.randint(-127, 128, SHAPE, dtype=torch.int8, device="cuda"), torch.rand(N, device="cuda"))
    yield "dense", Dense(torch.randn(SHAPE, dtype=torch.bfloat16, device="cuda"))


def case(name: str, size: int, run: Callable[..., Any], *args: Any, **options: Any) -> dict[str, Any]:
    import triton

    ms = triton.testing.do_bench(lambda: run(*args, **options), warmup=5, rep=20, return_mode="median")
    return {"op": "fp8", "case": name, "ms": ms, "gb_s": size / ms / 1e6}


def cases() -> Iterator[dict[str, Any]]:
    """{"op", "case", "ms", "gb_s"}; nothing without a GPU that has e4m3."""
    if not torch.cuda.is_available() or not fp8_supported(torch.device("cuda")):
        return
    from gazelle.kernels import nf4_triton

    for K in (4096, 6144, 14336, 28672):
        x = torch.randn(T, K + 64, dtype=torch.bfloat16, device="cuda")[:, :K]
        factors = torch.rand(K, device="cuda")
        for name, columns in (("", None), (", columns scaled", factors)):
            yield case(f"quantize_rows {T}x{K}{name}", 3 * T * K, quantize_rows, x, columns)
    N, K = SHAPE
    rows = torch.empty(N, K, dtype=torch.float8_e4m3fn, device="cuda")
    columns8 = torch.empty(K, N, dtype=torch.float8_e4m3fn, device="cuda")
    whole = torch.empty(N, K + 64, dtype=torch.bfloat16, device="cuda")[:, :K]
    for name, storage in storages():
        scales = storage.row_scales()
        size = storage.nbytes + rows.nbytes
        yield case(f"{name} write_fp8", size, storage.write_fp8, rows, scales)
        yield case(f"{name} write_fp8_transposed", size, storage.write_fp8_transposed, columns8, scales)
        yield case(f"{name} row_scales", storage.nbytes if name == "dense" else 0, storage.row_scales)
        if name == "int8":
            yield case(f"{name} write bfloat16", storage.nbytes + 2 * rows.nbytes, storage.write, whole)
        if name == "nf4" and isinstance(storage, NF4):
            for label, launch in nf4_triton.TRANSPOSED_LAUNCHES.items():
                yield case(f"{name} write_fp8_transposed, {label}", size, nf4_triton.dequantize, storage.packed,
                           storage.code, storage.absmax, None, storage.block, columns8, scales, transposed=True,
                           launch=launch)


def largest_error() -> float:
    """Of a projection in fp8 against float32, relative, with weights and inputs from a normal distribution."""
    from gazelle.kernels.fp8 import divide_rows, scaled_mm

    x, w = (torch.randn(shape, device="cuda") for shape in ((512, 4096), (1024, 4096)))
    scales = scale_of(w.abs().amax(1))
    eight = divide_rows(w, scales, torch.empty_like(w, dtype=torch.float8_e4m3fn))
    inner, inner_scales = quantize_rows(x)
    y = scaled_mm(inner, eight, inner_scales, scales, torch.bfloat16).double()
    exact = x.double() @ w.double().t()
    return float((y - exact).norm() / exact.norm())


if __name__ == "__main__":
    for result in cases():
        print(f"{result['case']:50} {result['ms']:9.4f} ms {result['gb_s']:8.0f} GB/s", flush=True)
    if torch.cuda.is_available():
        print(f"error of a projection: {largest_error():.1e}")
