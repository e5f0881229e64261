"""How fast a model is on this machine, and what it needs: prefill, decoding and a training step, by length and batch.

Shapes: B rows of T random tokens. Random ids take as long as real ones, and no row is padded.
"""

import contextlib
import functools
import gc
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import OptionError
from gazelle.base.log import logger
from gazelle.base.machine import machine_facts
from gazelle.base.memory import memory_growth
from gazelle.evaluate.benchmark_report import OUT_OF_MEMORY, BenchmarkReport, Cell
from gazelle.models import options
from gazelle.models.context import context_limit
from gazelle.models.modes import evaluating
from gazelle.quantize.bnb import is_quantized_linear

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NO_MEMORY = re.compile(r"not enough memory|can't allocate memory|cannot allocate memory|out of memory", re.IGNORECASE)


def benchmark(
    model: Any, tokenizer: "PreTrainedTokenizerBase | None" = None, seq_lengths: Sequence[int] = (256, 512),
    batch_sizes: Sequence[int] = (1, 2, 4), dtype: "str | torch.dtype | None" = None, warmup: int = 3,
    iterations: int = 10, *, new_tokens: int = 16, train: bool = True,
) -> BenchmarkReport:
    """Measure a model for every length and batch size; medians over the iterations.

    Prefill is the forward pass over a prompt, with a cache, to the logits of its last token: the time to the first
    token. Decoding goes on from there, one token a pass, always as many tokens. A training step is the model's own
    loss on all tokens, its gradients and an update by AdamW of what can be trained, which is put back afterwards.
    Memory is that of all weights and the most in use beyond what was at the start. Where it runs out, the cell says so.

    Args:
        model: a Hugging Face causal model, as it is: with or without an adapter, a quantised base, the engine.
        tokenizer: whose vocabulary tokens are drawn from; left out, the model's.
        seq_lengths: tokens of a prompt, and of a row to train on.
        batch_sizes: rows at a time.
        dtype: "fp32", "bf16" or "fp16": weights are kept so while it measures, but for a trained adapter's. Left out,
            as they are.
        warmup: iterations that do not count.
        iterations: that do.
        new_tokens: decoded in each iteration.
        train: measure a training step, if anything of the model can be trained.

    Raises:
        OptionError: a number out of range, a length beyond the model's, or a type that this device or a quantised model
            cannot be measured in.
    """
    device = next(iter(model.parameters())).device
    _check(model, seq_lengths, batch_sizes, warmup, iterations, new_tokens)
    vocabulary = unwrap(model).get_input_embeddings().weight.shape[0]
    vocabulary = vocabulary if tokenizer is None else min(vocabulary, len(tokenizer))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad] if train else []
    cells = [Cell(rows, length) for rows in batch_sizes for length in seq_lengths]
    with _in_dtype(model, dtype, device) as kept, _restored(trained), torch.random.fork_rng():
        weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        with memory_growth(str(device)) as start:  # buffers that a cell leaves behind count in the next one, too
            pass
        rest = (start.before or 0) - weights
        # Training last: what it leaves behind would count in the inference of later cells.
        for cell in cells:
            logger.info("measuring %d × %d tokens …", cell.batch_size, cell.seq_length)
            ids = _tokens(cell, vocabulary, device)
            _measured(cell, "inference_error", functools.partial(
                _inference, model, ids, cell, rest, warmup, iterations, new_tokens))
        for cell in cells if trained else ():
            logger.info("measuring a training step of %d × %d tokens …", cell.batch_size, cell.seq_length)
            ids = _tokens(cell, vocabulary, device)
            _measured(cell, "train_error", functools.partial(
                _training, model, trained, ids, cell, rest, warmup, iterations))
    return BenchmarkReport(cells, machine_facts(), {
        "model": getattr(unwrap(model).config, "_name_or_path", ""), "dtype": kept, "weights_bytes": weights,
        "trained_parameters": sum(parameter.numel() for parameter in trained), "warmup": warmup,
        "iterations": iterations, "new_tokens": new_tokens})


def _tokens(cell: Cell, vocabulary: int, device: torch.device) -> torch.Tensor:
    """[B, T] random ids, the same each time."""
    return torch.randint(vocabulary, (cell.batch_size, cell.seq_length), device=device,
                         generator=torch.Generator(device).manual_seed(0))


def _measured(cell: Cell, error_field: str, measure: Callable[[], None]) -> None:
    """Run a measurement; memory that runs out is a result."""
    try:
        measure()
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError, and so is a CPU's
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        setattr(cell, error_field, OUT_OF_MEMORY)
    if getattr(cell, error_field):
        gc.collect()  # what ran out of memory may hold tensors in cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _inference(model: Any, ids: torch.Tensor, cell: Cell, rest: int, warmup: int, iterations: int,
               new_tokens: int) -> None:
    def once() -> tuple[float, float]:
        began = _now(ids.device)
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        prefilled = _now(ids.device)
        for _ in range(new_tokens):
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
            token = output.logits[:, -1:].argmax(-1)
        return prefilled - began, _now(ids.device) - prefilled

    with torch.no_grad(), evaluating(model):
        with memory_growth(str(ids.device)) as growth:
            once()
        times = [once() for _ in range(warmup + iterations)][warmup:]
    prefill, decode = (statistics.median(values) for values in zip(*times, strict=True))
    cell.first_token_seconds, cell.prefill_tokens_per_second = prefill, ids.numel() / prefill
    cell.decode_tokens_per_second = ids.shape[0] * new_tokens / decode
    cell.inference_bytes = None if growth.peak is None else growth.peak - rest


def _training(model: Any, trained: Sequence[torch.nn.Parameter], ids: torch.Tensor, cell: Cell, rest: int,
              warmup: int, iterations: int) -> None:
    modes = [(module, module.training) for module in model.modules()]
    earlier = [parameter.grad for parameter in trained]
    model.train()
    optimizer = torch.optim.AdamW(trained, lr=1e-6)

    def once() -> float:
        began = _now(ids.device)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return _now(ids.device) - began

    try:
        optimizer.zero_grad(set_to_none=True)
        with memory_growth(str(ids.device)) as growth:
            once()
            once()  # the first makes the optimizer's state, and has no peak with it
        step = statistics.median([once() for _ in range(warmup + iterations)][warmup:])
    finally:
        for parameter, grad in zip(trained, earlier, strict=True):
            parameter.grad = grad
        for module, mode in modes:
            module.training = mode
    cell.step_seconds, cell.train_tokens_per_second = step, ids.numel() / step
    cell.train_bytes = None if growth.peak is None else growth.peak - rest


def _now(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _check(model: Any, seq_lengths: Sequence[int], batch_sizes: Sequence[int], warmup: int, iterations: int,
           new_tokens: int) -> None:
    for name, values, least in (("seq_lengths", seq_lengths, 2), ("batch_sizes", batch_sizes, 1),
                                ("warmup", [warmup], 0), ("iterations", [iterations], 1),
                                ("new_tokens", [new_tokens], 1)):
        if not values or any(value < least for value in values):
            raise OptionError("a value out of range", where=name, found=values, expected=f"at least {least}",
                              fix=f"change {name}")
    limit = context_limit(unwrap(model).config)
    if limit is not None and max(seq_lengths) + new_tokens > limit:
        raise OptionError("longer than the model's positions reach", where="seq_lengths",
                          found=f"{max(seq_lengths)} and {new_tokens} new tokens", expected=f"at most {limit} together",
                          fix="choose shorter seq_lengths, or load the model with a larger max_seq_length")


@contextlib.contextmanager
def _in_dtype(model: Any, dtype: "str | torch.dtype | None", device: torch.device) -> Iterator[str]:
    """Weights in that type while it lasts, but for a trained adapter's; gives the type's name."""
    base = unwrap(model)
    wanted = base.dtype if dtype is None else options.dtype(dtype)
    if wanted == "auto" or wanted == base.dtype:
        yield str(base.dtype).removeprefix("torch.")
        return
    name = str(wanted).removeprefix("torch.")
    if any(is_quantized_linear(module) for module in base.modules()):
        raise OptionError("a quantised model is measured as it is", where="dtype", found=name,
                          expected="no dtype", fix="leave dtype out, or load the model with load_in_4bit=False")
    _check_dtype(wanted, device, name)  # type: ignore[arg-type]
    adapted = hasattr(model, "peft_config")
    kept = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())
            if tensor.dtype == base.dtype and not (adapted and tensor.requires_grad)]
    try:
        for tensor, data in kept:
            tensor.data = data.to(wanted)
        yield name
    finally:
        for tensor, data in kept:
            tensor.data = data


def _check_dtype(dtype: torch.dtype, device: torch.device, name: str) -> None:
    """Raise `OptionError` unless the device computes a product and its gradient in that type."""
    try:
        x = torch.ones(8, 8, dtype=dtype, device=device, requires_grad=True)
        torch.nn.functional.silu(x @ x).float().sum().backward()
    except (RuntimeError, TypeError) as error:  # TypeError: what the device has no such type for (mps)
        raise OptionError(f"{device.type} does not compute in {name}", where="dtype", found=str(error),
                          expected="a type that this device has", fix="leave dtype out") from error


@contextlib.contextmanager
def _restored(parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Afterwards the values are what they were; meanwhile they are kept in host memory."""
    kept = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(parameters, kept, strict=True):
                parameter.copy_(values)
