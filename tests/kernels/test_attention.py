"""Attention of every backend against each row alone in float64, forward and backward."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gazelle.kernels import attention as module
from gazelle.kernels.attention import Rows, attention, choose, packed_attention
from gazelle.kernels.attention_dense import Scores, _batched, _plain, _row_by_row, _sdpa, is_short
from gazelle.kernels.attention_flex import BLOCK, block_mask

H, D, SCALE = 6, 16, 0.3
SIZES = {"packed": (5, 1, 0, 13, 0), "uniform": (7, 7, 7)}
VARIANTS = [(None, None), (4, None), (None, 2.0), (4, 2.0), (99, None)]
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def reference(q, k, v, sizes, window=None, softcap=None, mask=None, scale=SCALE):
    """Row by row, head by head; mask: [R, L, L] bool or additive in place of causality."""
    outputs = []
    groups = q.shape[1] // k.shape[1]
    for number, (a, b, c) in enumerate(zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True)):
        n = len(a)
        scores = torch.einsum("qhd,khd->hqk", a, b.repeat_interleave(groups, 1)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)
        hidden = distance >= (window or 10**9)
        if mask is None:
            hidden = hidden | (distance < 0)
        elif mask.dtype == torch.bool:
            hidden = hidden | ~mask[number]
        else:
            scores = scores + mask[number]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, c.repeat_interleave(groups, 1)))
    return torch.cat(outputs)


def fused(tokens, heads, kv_heads, dtype=torch.float64, device="cpu", head_dim=D, border=8, seed=0):
    """q, k, v as strided views into one buffer, as the engine hands them."""
    generator = torch.Generator().manual_seed(seed)
    width = (heads + 2 * kv_heads) * head_dim
    buffer = torch.randn(tokens, width + border, generator=generator, dtype=torch.float64).to(device, dtype)
    parts = buffer[:, :width].split([n * head_dim for n in (heads, kv_heads, kv_heads)], 1)
    return [part.unflatten(1, (-1, head_dim)).detach().requires_grad_() for part in parts]


def rows_of(kind, device="cpu", **options):
    sizes = SIZES[kind]
    if kind == "uniform":
        return Rows(len(sizes), sizes[0], uniform=True, **options)
    starts = torch.tensor([0, *sizes]).cumsum(0, dtype=torch.int32).to(device)
    return Rows(len(sizes), max(sizes), cu_seqlens=starts, **options)


def compare(run, inputs, sizes, tolerance, **options):
    """Forward and backward of `run` against the reference in float64 on the CPU, by norm of the difference."""
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    want = reference(*exact, sizes, **options)
    got = run(*inputs)
    assert got.shape == want.shape
    assert got.is_contiguous()
    direction = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=want.dtype)
    grads = torch.autograd.grad(got, inputs, direction.to(got.device, got.dtype))
    wanted = torch.autograd.grad(want, exact, direction)
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), (got, *grads), (want, *wanted), strict=True):
        assert ours.dtype == inputs[0].dtype
        difference = (ours.double().cpu() - theirs).norm() / theirs.norm()
        assert difference <= tolerance, f"{name} is off by {difference:.1e}"


@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa"])
@pytest.mark.parametrize("kind", ["packed", "uniform"])
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize(("window", "softcap"), VARIANTS)
def test_equals_each_row_alone(backend, kind, kv_heads, window, softcap):
    if backend == "sdpa" and softcap:
        pytest.skip("no soft-cap in sdpa")
    inputs = fused(sum(SIZES[kind]), H, kv_heads)
    compare(lambda *x: attention(*x, rows_of(kind), SCALE, window, softcap, backend=backend), inputs, SIZES[kind],
            1e-14, window=window, softcap=softcap)


@pytest.mark.parametrize("layout", [_batched, _row_by_row])
@pytest.mark.parametrize("dense", [_plain, _sdpa])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_both_layouts_of_packed_rows(layout, dense, window, dtype):
    inputs = fused(19, H, 2, dtype)
    compare(lambda *x: layout(dense, *x, rows_of("packed"), Scores(SCALE, window)), inputs, SIZES["packed"],
            1e-14 if dtype == torch.float64 else 1e-6, window=window)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("additive", [False, True])
def test_masks_replace_causality(backend, window, additive):
    """A batch padded on the left, and a row that looks both ways. Padding that sees nothing sees itself."""
    mask = torch.ones(3, 7, 7, dtype=torch.bool).tril()
    mask[0, :, :2] = False
    mask[1] = True
    seen = mask.clone()
    seen[0, torch.arange(2), torch.arange(2)] = True
    given = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf) if additive else mask
    rows = rows_of("uniform", mask=given[:, None])
    compare(lambda *x: attention(*x, rows, SCALE, window, backend=backend), fused(21, H, 2), SIZES["uniform"], 1e-14,
            window=window, mask=seen)


def test_sizes_on_the_host_are_enough():
    rows = Rows(5, 13, sizes=SIZES["packed"])
    compare(lambda *x: attention(*x, rows, SCALE), fused(19, H, 2), SIZES["packed"], 1e-14)


def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    q, k, v = fused(19, H, 2)
    kept = attention(q, k, v, rows_of("packed"), SCALE)
    for backend in ("auto", "reference"):
        runs = torch.stack([attention(q, k, v, rows_of("packed"), SCALE, dropout=0.3, backend=backend)
                            for _ in range(400)])
        assert not torch.equal(runs[0], runs[1])
        assert (runs.mean(0) - kept).norm() <= 0.1 * kept.norm()


@pytest.mark.parametrize("kind", ["packed", "uniform"])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_no_row_sees_another(kind, backend):
    q, k, v = fused(sum(SIZES[kind]), H, 2)
    n = SIZES[kind][0]
    out = attention(q, k, v, rows_of(kind), SCALE, backend=backend)
    for x in torch.autograd.grad(out[:n].sum(), (q, k, v)):
        assert x[:n].any()
        assert not x[n:].any()


def test_rows_changed_in_place_are_read_again():
    q, k, v = fused(19, H, H)
    rows = rows_of("packed")
    first = attention(q, k, v, rows, SCALE)
    rows.cu_seqlens.copy_(torch.tensor([0, 6, 6, 12, 18, 19]))
    torch.testing.assert_close(attention(q, k, v, rows, SCALE), reference(q, k, v, (6, 0, 6, 6, 1)))
    assert not torch.equal(first, attention(q, k, v, rows, SCALE))


@pytest.mark.parametrize("heads", [6, 2])
def test_the_layout_of_hugging_face(heads):
    inputs = fused(19, H, heads)
    starts = rows_of("packed").cu_seqlens.long()

    def run(*x):
        out = packed_attention(*(y.transpose(0, 1)[None] for y in x), starts, 13, SCALE, 4)
        assert out.shape == (1, H, 19, D)
        return out[0].transpose(0, 1)

    compare(run, inputs, SIZES["packed"], 1e-14, window=4)


def test_rows_that_do_not_add_up():
    x = torch.randn(1, H, 8, D)
    with pytest.raises(ValueError, match="describes 7 tokens, but there are 8"):
        packed_attention(x, x, x, torch.tensor([0, 3, 7]), 4, 1.0)


def test_what_cannot_be_is_refused():
    q, k, v = fused(21, H, 2)
    rows, masked = rows_of("uniform"), rows_of("uniform", mask=torch.ones(3, 1, 7, 7, dtype=torch.bool))
    for backend, options in [("sdpa", {"softcap": 2.0}), ("varlen", {"softcap": 2.0}), ("flex", {"dropout": 0.1}),
                             ("cudnn", {"window": 3}), ("flash", {"dropout": 0.1})]:
        with pytest.raises(ValueError, match="know"):
            attention(q, k, v, rows, SCALE, **options, backend=backend)
    for backend in ("varlen", "flex", "cudnn", "flash"):
        with pytest.raises(ValueError, match="know"):
            attention(q, k, v, masked, SCALE, backend=backend)
    with pytest.raises(ValueError, match="need cu_seqlens"):
        Rows(2, 4)
    with pytest.raises(ValueError, match="uniform"):
        Rows(2, 4, sizes=(4, 3), mask=torch.ones(2, 1, 4, 4))


class Queries:
    """Stands for a tensor on a GPU."""

    def __init__(self, dtype=torch.bfloat16, head_dim=128, device="cuda"):
        self.device, self.dtype, self.shape = torch.device(device), dtype, (64, 8, head_dim)


@pytest.mark.parametrize(("want", "queries", "kind", "options"), [
    ("cudnn", {}, 1024, {}),
    ("varlen", {}, 1023, {}),
    ("varlen", {"head_dim": 256}, 1024, {}),
    ("varlen", {}, 1024, {"window": 4}),
    ("flex", {}, 1024, {"softcap": 2.0}),
    ("sdpa", {}, 1024, {"dropout": 0.1}),
    ("sdpa", {"head_dim": 264}, 1024, {}),
    ("varlen", {}, "uniform", {}),
    ("reference", {}, "uniform", {"softcap": 2.0}),
    ("varlen", {}, "packed", {}),
    ("varlen", {"head_dim": 80}, "packed", {"window": 4}),
    ("sdpa", {"head_dim": 20}, "packed", {}),
    ("sdpa", {"dtype": torch.float32}, "packed", {}),
    ("sdpa", {}, "packed", {"dropout": 0.1}),
    ("flex", {}, "long", {"softcap": 2.0}),
    ("reference", {}, "packed", {"softcap": 2.0}),
    ("reference", {"dtype": torch.float32}, "long", {"softcap": 2.0}),
    ("sdpa", {"device": "mps"}, "packed", {}),
])
def test_the_choice(want, queries, kind, options, monkeypatch):
    monkeypatch.setattr(module, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    assert choose(Queries(**queries), kind_of_rows(kind), **options) == want


def kind_of_rows(kind):
    """A number: two rows of that many tokens."""
    if isinstance(kind, int):
        return Rows(2, kind, uniform=True)
    return Rows(2, 64, sizes=(64, 3)) if kind == "long" else rows_of(kind)


def test_the_choice_where_runs_must_repeat_and_on_amd(monkeypatch):
    """cuDNN's backward pass adds up in any order, and is NVIDIA's alone."""
    monkeypatch.setattr(module, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    assert choose(Queries(), kind_of_rows(1024)) == "cudnn"
    torch.use_deterministic_algorithms(True)
    try:
        assert choose(Queries(), kind_of_rows(1024)) == "varlen"
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert choose(Queries(), kind_of_rows(1024)) == "varlen"


def test_the_choice_on_older_gpus_and_for_masks(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    masked = rows_of("uniform", mask=torch.ones(3, 1, 7, 7, dtype=torch.bool))
    for capability, want in (((8, 0), "varlen"), ((7, 5), "sdpa")):
        monkeypatch.setattr(module, "_capability", lambda device, found=capability: found)
        assert choose(Queries(), kind_of_rows(1024)) == want
        assert choose(Queries(), masked) == "sdpa"


def test_a_cpu_pads_short_rows_of_like_length():
    assert is_short(Rows(3, 60, sizes=(60, 50, 55)), 165)
    assert not is_short(Rows(3, 60, sizes=(60, 5, 5)), 70)
    assert not is_short(Rows(2, 200, sizes=(200, 200)), 400)
    q, k, v = fused(165, H, 2)
    rows = Rows(3, 60, sizes=(60, 50, 55))
    assert choose(q, rows) == "reference"
    compare(lambda *x: attention(*x, rows, SCALE), (q, k, v), (60, 50, 55), 1e-14)


@pytest.mark.parametrize("window", [None, 1, 100, 129, 300])
@pytest.mark.parametrize("sizes", [(700,), (300, 0, 80, 4, 140, 258, 0), (128, 128, 256), (1,)])
def test_block_masks_cover_what_is_seen(window, sizes):
    """Every pair that may look is in a block that is looked at, and whole blocks hold such pairs alone."""
    length = sum(sizes)
    mask = block_mask(Rows(len(sizes), max(sizes), sizes=sizes), length, window, torch.device("cpu"))
    row = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    position = torch.arange(length)
    distance = position[:, None] - position
    seen = (distance >= 0) & (distance < (window or length)) & (row[:, None] == row)
    assert torch.equal(mask.mask_mod(0, 0, position[:, None], position), seen)
    blocks = -(-length // BLOCK)
    tiles = torch.zeros(blocks * BLOCK, blocks * BLOCK, dtype=torch.bool)
    tiles[:length, :length] = seen
    tiles = tiles.view(blocks, BLOCK, blocks, BLOCK).transpose(1, 2)
    partial, full = (dense(*pair, blocks) for pair in ((mask.kv_num_blocks, mask.kv_indices),
                                                       (mask.full_kv_num_blocks, mask.full_kv_indices)))
    assert not (partial & full).any()
    assert torch.equal(partial | full, tiles.any(-1).any(-1))
    assert torch.equal(full, tiles.all(-1).all(-1) & torch.ones_like(full).tril(-1))


def dense(count: Tensor, indices: Tensor, blocks: int) -> Tensor:
    found = torch.zeros(blocks, blocks, dtype=torch.bool)
    for query in range(blocks):
        found[query, indices[0, 0, query, : count[0, 0, query]].long()] = True
    return found


# What follows runs on a GPU.

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
LONG = {"packed": (5, 64, 1, 0, 33, 300, 97, 0, 0), "uniform": (160, 160, 160)}


def gpu_rows(kind, **options):
    sizes = LONG[kind]
    if kind == "uniform":
        return Rows(len(sizes), sizes[0], uniform=True, **options)
    starts = torch.tensor([0, *sizes]).cumsum(0, dtype=torch.int32).cuda()
    return Rows(len(sizes), 320, cu_seqlens=starts)


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


CASES = [(backend, kind, head_dim, window, softcap)
         for backend, windows in (("cudnn", (None,)), ("flash", (None,)), ("varlen", (None, 7)), ("sdpa", (None, 7)),
                                  ("reference", (None, 7)), ("auto", (None, 7)))
         for kind in LONG for head_dim in (64, 80, 96, 128, 256) for window in windows
         for softcap in ((None, 5.0) if backend == "reference" else (None,))
         if backend != "cudnn" or head_dim <= 128]
CASES += [("flex", "packed", 64, None, 5.0), ("flex", "packed", 256, 7, 5.0), ("flex", "uniform", 80, 7, None)]


@pytest.mark.parametrize(("backend", "kind", "head_dim", "window", "softcap"),
                         [pytest.param(*case, marks=GPU) for case in CASES])
@pytest.mark.filterwarnings("ignore")  # torch.compile warns about many things
def test_natively(backend, kind, head_dim, window, softcap):
    if backend == "cudnn" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("cuDNN's attention is used from Hopper on")
    inputs = fused(sum(LONG[kind]), 8, 2, torch.bfloat16, "cuda", head_dim)
    compare(lambda *x: attention(*x, gpu_rows(kind), 0.125, window, softcap, backend=backend), inputs, LONG[kind],
            TOLERANCE[torch.bfloat16], window=window, softcap=softcap, scale=0.125)


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=GPU) for dtype in TOLERANCE])
@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
def test_natively_in_each_type(dtype, kind, backend):
    inputs = fused(sum(LONG[kind]), 8, 2, dtype, "cuda", 64)
    with exact_products():
        compare(lambda *x: attention(*x, gpu_rows(kind), 0.125, backend=backend), inputs, LONG[kind],
                TOLERANCE[dtype], scale=0.125)


@pytest.mark.parametrize("backend", [pytest.param(name, marks=GPU) for name in ("auto", "sdpa", "reference")])
def test_masks_natively(backend):
    mask = torch.ones(3, 160, 160, dtype=torch.bool).tril()
    mask[0, :, :30] = False
    seen = mask.clone()
    seen[0, torch.arange(30), torch.arange(30)] = True
    rows = gpu_rows("uniform", mask=mask[:, None].cuda())
    compare(lambda *x: attention(*x, rows, 0.125, backend=backend), fused(480, 8, 2, torch.bfloat16, "cuda", 64),
            LONG["uniform"], TOLERANCE[torch.bfloat16], mask=seen, scale=0.125)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gradients_in_another_layout_are_not_misread():
    q, k, v = fused(480, 8, 2, torch.bfloat16, "cuda", 64)
    rows = gpu_rows("uniform")
    direction = torch.randn(480, 8, 64, dtype=torch.bfloat16, device="cuda")
    wide = torch.zeros(480, 8 * 64 + 16, dtype=torch.bfloat16, device="cuda")[:, :512].unflatten(1, (8, 64))
    wide.copy_(direction)
    first, second = (torch.autograd.grad(attention(q, k, v, rows, 0.125), (q, k, v), grad)
                     for grad in (direction, wide))
    for x, y in zip(first, second, strict=True):
        torch.testing.assert_close(x, y, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("backend", [pytest.param(name, marks=GPU) for name in ("varlen", "flex", "reference")])
@pytest.mark.filterwarnings("ignore")
def test_in_a_cuda_graph_the_rows_may_change(backend):
    """One graph, replayed for rows of other lengths: as many tokens, and room for the longest."""
    q, k, v = fused(500, 8, 2, torch.bfloat16, "cuda", 64)
    starts = torch.tensor([0, *LONG["packed"]]).cumsum(0, dtype=torch.int32).cuda()
    direction = torch.randn(500, 8, 64, dtype=torch.bfloat16, device="cuda")

    def step():
        rows = Rows(len(starts) - 1, 320, cu_seqlens=starts)
        out = attention(q, k, v, rows, 0.125, backend=backend)
        return out, *torch.autograd.grad(out, (q, k, v), direction)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    other = (100, 100, 300, 0, 0, 0, 0, 0, 0)
    starts.copy_(torch.tensor([0, *other]).cumsum(0, dtype=torch.int32))
    graph.replay()
    torch.cuda.synchronize()
    exact = [x.detach().double().cpu().requires_grad_() for x in (q, k, v)]
    want = reference(*exact, other, scale=0.125)
    for ours, theirs in zip(results, (want, *torch.autograd.grad(want, exact, direction.double().cpu())), strict=True):
        assert (ours.double().cpu() - theirs).norm() <= TOLERANCE[torch.bfloat16] * theirs.norm()
