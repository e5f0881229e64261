"""`gazelle doctor`: what is here, does it really run, and what would be needed for the rest."""

import importlib.metadata
import importlib.util
import platform
import time

import psutil
import torch
from rich.console import Console
from rich.table import Table

from gazelle import __version__
from gazelle.base.device import default_device, default_dtype, device_name, memory_in_use, total_memory
from gazelle.base.optional import OPTIONAL, version
from gazelle.export.consumers.llama import find_library
from gazelle.kernels.attention import packed_attention

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "gguf")


def doctor_command() -> None:
    """Print versions, devices, the checks that ran, and the optional parts with how to get them."""
    console = Console()
    device = default_device()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("gazelle", __version__)
    table.add_row("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in PACKAGES:
        table.add_row(name, importlib.metadata.version(name))
    table.add_row("device", f"{device_name(device)}, {total_memory(device) / 1e9:.1f} GB")
    table.add_row("computes in", str(default_dtype()).removeprefix("torch."))
    table.add_row("host memory", f"{psutil.virtual_memory().total / 1e9:.1f} GB, "
                                 f"{psutil.virtual_memory().available / 1e9:.1f} GB free")
    console.print(table)
    console.print("\n[bold]checks[/]")
    for name, check in (("packed attention", check_attention), ("NF4 storage", check_nf4)):
        began = time.perf_counter()
        finding = check(device)
        console.print(f"  {name:<18}{finding}, {(time.perf_counter() - began) * 1e3:.0f} ms", highlight=False,
                      soft_wrap=True)
    console.print(f"  {'baseline memory':<18}{memory_in_use(device) / 1e9:.2f} GB in use by this process on {device}",
                  highlight=False, soft_wrap=True)
    console.print("\n[bold]optional parts[/]")
    width = max(18, *(len(distribution) + 2 for distribution, *_ in OPTIONAL.values()))
    for module, (distribution, purpose, command) in OPTIONAL.items():
        installed = version(module)
        console.print(f"  {distribution:<{width}}{installed or 'not installed'} · {purpose}"
                      + ("" if installed else f"\n{'':<{width + 2}}{command}"), markup=False, highlight=False,
                      soft_wrap=True)
    console.print("\n[bold]programs that exports are verified by[/]")
    library = find_library()
    vllm = importlib.util.find_spec("vllm") is not None
    for name, found, otherwise in (
            ("llama.cpp", str(library) if library else "", "--llama FOLDER of an unpacked release"),
            ("vLLM", importlib.metadata.version("vllm") if vllm else "", "--vllm PYTHON of its own environment")):
        console.print(f"  {name:<{width}}{found or f'not found here; gazelle export --verify takes {otherwise}'}",
                      markup=False, highlight=False, soft_wrap=True)


def check_attention(device: str) -> str:
    """Run the packed attention op forward and backward on the device and compare with float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 24, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    cu_seqlens = torch.tensor([0, 9, 24], dtype=torch.int32)
    gradients = []
    for where, dtype in (("cpu", torch.float64), (device, torch.float32)):
        inputs = [tensor.detach().to(where, dtype).requires_grad_() for tensor in (q, k, v)]
        output = packed_attention(inputs[0], inputs[1], inputs[2], cu_seqlens.to(where), 15, 0.25)
        gradients.append([gradient.cpu().double() for gradient in torch.autograd.grad(output.square().sum(), inputs)])
    error = max((a - b).abs().max().item() for a, b in zip(*gradients, strict=True))
    return f"{'ok' if error < 1e-3 else 'WRONG'} (forward and backward ran on {device}, largest error {error:.0e})"


def check_nf4(device: str) -> str:
    """Store a matrix as NF4 on the device and read it back."""
    import bitsandbytes.functional as bnb

    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)).to(device)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    error = ((bnb.dequantize_4bit(packed, state) - weight).norm() / weight.norm()).item()
    return f"{'ok' if error < 0.12 else 'WRONG'} (relative error {error:.1%} at 4.1 bits a weight)"
