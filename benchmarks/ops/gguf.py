"""GGUF's block formats: weights quantised and read back, beside llama.cpp's own library on as many threads.

GB/s count the float32 side. On a GPU there is nothing to compare with. Run alone it prints.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from benchmarks.ops._timing import DEVICE, ON_GPU, case, show
from torch import Tensor

from gazelle.quantize.gguf import KINDS, dequantize, quantize

SHAPE = (8192, 8192) if ON_GPU else (1024, 4096)


def on_threads(run: Callable[..., Tensor]) -> Callable[..., None]:
    """llama.cpp's functions work on one thread: each gets an equal share of the rows."""

    def shared(rows: Tensor, *args: Any) -> None:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(lambda part: run(part, *args), rows.chunk(torch.get_num_threads())))

    return shared


def cases() -> Iterator[dict[str, Any]]:
    """{"op", "case", "ms", "gb_s"}."""
    from tests import ggml

    torch.manual_seed(0)
    weight = torch.randn(SHAPE, device=DEVICE) / 50
    importance = torch.rand(SHAPE[1], device=DEVICE)
    theirs = not ON_GPU and ggml.library() is not None
    for kind in list(KINDS)[1:]:
        name = f"{SHAPE[0]}x{SHAPE[1]} {kind}"
        for label, chosen in (("", None), (" with importance", importance)):
            if chosen is not None and not KINDS[kind].searched:
                continue
            yield case("gguf", f"{name}{label}", weight.nbytes, quantize, weight, kind, chosen)
            if theirs:
                yield case("gguf", f"{name}{label}, llama.cpp", weight.nbytes, on_threads(ggml.quantize), weight, kind,
                           chosen)
        data = quantize(weight, kind)
        yield case("gguf", f"{name} read", weight.nbytes, dequantize, data, kind)
        if theirs:
            yield case("gguf", f"{name} read, llama.cpp", weight.nbytes, on_threads(ggml.dequantize), data, kind)


if __name__ == "__main__":
    show(cases())
