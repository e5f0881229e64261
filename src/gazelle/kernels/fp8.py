"""Products in fp8 (e4m3, https://arxiv.org/abs/2209.05433) with a scale a row of either factor.

Shapes: T tokens, N outputs, K inputs.
"""

import torch
from torch import Tensor

from gazelle.kernels.dispatch import use_triton

LARGEST = 448.0  # of e4m3
_SMALLEST = 1e-12  # a row of zeros gets this for its largest number


def fp8_supported(device: torch.device) -> bool:
    """True for NVIDIA GPUs from Ada (8.9) on, which multiply e4m3, with a torch whose `_scaled_mm` takes row scales.

    Only such a build knows CUDA 12 or newer.
    """
    if device.type != "cuda" or torch.version.cuda is None or not hasattr(torch, "_scaled_mm"):
        return False
    return int(torch.version.cuda.split(".")[0]) >= 12 and torch.cuda.get_device_capability(device) >= (8, 9)


def to_fp8(x: Tensor) -> Tensor:
    """x in e4m3, what is too large saturated. A NaN stays one."""
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def scale_of(amax: Tensor) -> Tensor:
    """What numbers up to `amax` are divided by so that e4m3 holds them, float32; never 0."""
    return amax.float().clamp(min=_SMALLEST) / LARGEST


def quantize_rows(x: Tensor, scale_columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x in e4m3 [T, K], contiguous, and what each row was divided by [T, 1] (float32).

    Args:
        x: [T, K], rows may lie apart.
        scale_columns: [K] float32 that x is multiplied by first.
    """
    if use_triton(x):
        from gazelle.kernels import fp8_triton

        return fp8_triton.quantize_rows(x, scale_columns)
    wide = x.float() if scale_columns is None else x.float() * scale_columns
    scale = scale_of(wide.abs().amax(1, keepdim=True))
    return to_fp8(wide * scale.reciprocal()), scale


def divide_rows(weight: Tensor, row_scales: Tensor, out: Tensor) -> Tensor:
    """Rows of a weight divided by their scales, in e4m3.

    Args:
        weight: [N, K]. row_scales: [N] float32.
        out: [N, K] to write to; rows may lie apart.
    """
    if use_triton(weight):
        from gazelle.kernels import fp8_triton

        return fp8_triton.divide_rows(weight, row_scales, out, transposed=False)
    return out.copy_(to_fp8(weight.float() * row_scales.reciprocal()[:, None]))


def divide_rows_transposed(weight: Tensor, row_scales: Tensor, out: Tensor) -> Tensor:
    """The same, written as [K, N]."""
    if use_triton(weight):
        from gazelle.kernels import fp8_triton

        return fp8_triton.divide_rows(weight, row_scales, out, transposed=True)
    return out.copy_(to_fp8(weight.float() * row_scales.reciprocal()[:, None]).t())


def scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """(a · scale_a) @ (b · scale_b)ᵀ [M, N]. On a GPU, sums have less than float32's bits and are rounded to bfloat16.

    Args:
        a: [M, K] e4m3. b: [N, K] e4m3; both contiguous, N and K multiples of 16.
        scale_a: [M, 1] float32. scale_b: [N] float32.
        out_dtype: of the result.
    """
    if a.is_cuda:
        # With row scales, torch promises bfloat16 alone.
        product = torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b[None, :], out_dtype=torch.bfloat16,
                                   use_fast_accum=True)
        return product.to(out_dtype)
    return ((a.float() @ b.float().t()) * scale_a * scale_b).to(out_dtype)
