"""Dequantising four bits into a corner of a wider matrix: every launch, bitsandbytes, and a copy of the same size.

GB/s count what has to be read and written. Run alone it prints.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gazelle.kernels.nf4 import Nested

BORDER = 64
SHAPE = (28672, 4096)
OTHERS = ((4096, 14336), (6144, 4096), (1536, 576))


def weight(N: int, K: int, nested: bool) -> tuple[Any, ...]:
    """Arguments of `dequantize` up to `block`: random bytes, scales as weights of a model have them."""
    packed = torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8, device="cuda")
    code = torch.linspace(-1, 1, 16, device="cuda")
    blocks = N * K // 64
    if not nested:
        return packed, code, torch.rand(blocks, device="cuda") / 50, None, 64
    second = Nested(torch.linspace(-1, 1, 256, device="cuda"), torch.rand(-(-blocks // 256), device="cuda") / 50,
                    torch.tensor(0.02, device="cuda"), 256)
    return packed, code, torch.randint(0, 256, (blocks,), dtype=torch.uint8, device="cuda"), second, 64


def traffic(arguments: tuple[Any, ...], out: Tensor) -> int:
    """Bytes that have to be read and written."""
    return arguments[0].nbytes + arguments[2].nbytes + out.numel() * out.element_size()


def case(name: str, size: int, run: Callable[..., Any], *args: Any, **options: Any) -> dict[str, Any]:
    import triton

    ms = triton.testing.do_bench(lambda: run(*args, **options), warmup=5, rep=20, return_mode="median")
    return {"op": "nf4", "case": name, "ms": ms, "gb_s": size / ms / 1e6}


def corner(N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(N + BORDER, K + BORDER, dtype=dtype, device="cuda")[:N, :K]


def cases() -> Iterator[dict[str, Any]]:
    """{"op", "case", "ms", "gb_s"}; nothing without a GPU."""
    if not torch.cuda.is_available():
        return
    from gazelle.kernels import nf4_triton

    name, out = f"{SHAPE[0]}x{SHAPE[1]}", corner(*SHAPE)
    dense = torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16)
    yield case(f"{name} copy of bfloat16", 2 * dense.nbytes, out.copy_, dense)
    for nested in (False, True):
        arguments = weight(*SHAPE, nested)
        kind = "nested" if nested else "plain"
        for label, launch in (("as launched", None), *nf4_triton.LAUNCHES.items()):
            yield case(f"{name} {kind}, {label}", traffic(arguments, out), nf4_triton.dequantize, *arguments, out, None,
                       transposed=False, launch=launch)
    if importlib.util.find_spec("bitsandbytes") is not None:
        from bitsandbytes import functional

        plain = weight(*SHAPE, nested=False)
        state = functional.QuantState(plain[2], torch.Size(SHAPE), plain[1], 64, "nf4", torch.bfloat16)
        yield case(f"{name} plain, bitsandbytes", traffic(plain, out), functional.dequantize_4bit, plain[0][:, None],
                   state)
    for shape in OTHERS:
        arguments, out = weight(*shape, nested=False), corner(*shape)
        yield case(f"{shape[0]}x{shape[1]} plain, as launched", traffic(arguments, out), nf4_triton.dequantize,
                   *arguments, out, None, transposed=False)


if __name__ == "__main__":
    for result in cases():
        print(f"{result['case']:50} {result['ms']:9.4f} ms {result['gb_s']:8.0f} GB/s", flush=True)
