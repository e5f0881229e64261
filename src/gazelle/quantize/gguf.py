"""Stand-in for ggml's block formats, until our own quantisers are here: those that the gguf package can write."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


def quantize(weight: "Tensor", kind: str, importance: "Tensor | None" = None) -> "Tensor":  # noqa: ARG001
    """[N, K] float32 as uint8 [N, bytes of a row]; `importance` is not used here."""
    import gguf
    import torch

    rows = weight.detach().float().contiguous().numpy()
    return torch.from_numpy(gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind.upper()]).view("uint8"))


def dequantize(data: "Tensor", kind: str, shape: tuple[int, ...]) -> "Tensor":
    """The float32 values behind the bytes that `quantize` made of a weight of `shape`."""
    import gguf
    import torch

    rows = data.numpy().reshape(*shape[:-1], -1)
    return torch.from_numpy(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind.upper()])).reshape(shape)
