"""What a layer is said to take, against what its pass holds, and on a GPU against the allocator."""

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.models.families import FAMILIES, adapt, make, packed, rows
from torch import Tensor

from gazelle import accelerate
from gazelle.engine import loss
from gazelle.engine.attended import Attended
from gazelle.engine.footprint import footprint, head_footprint
from gazelle.engine.keep import ALL, AWAY, CHOICES, KEEP, OFFLOAD, OUTPUT, OUTPUT_AWAY, Keep
from gazelle.engine.layer import Call
from gazelle.engine.outline import Batch, LayerOutline, Outline
from gazelle.engine.passes import Expanded, Pass
from gazelle.engine.plan import _Draft
from gazelle.engine.spec import DecoderSpec
from gazelle.kernels.attention import Rows
from gazelle.models.outline import outline_of
from gazelle.models.packed import packed_attention_on
from gazelle.models.swap import add_gradients_in_place, engine_layer, swapped_layers
from gazelle.train.loss import batch_loss

pytestmark = pytest.mark.usefixtures("one_thread")
HOST = [*(replace(keep, host=True) for keep in (KEEP, Keep(mlp=False), Keep(attention=False))),
        AWAY, replace(AWAY, mlp=False), OUTPUT_AWAY, replace(OUTPUT_AWAY, mlp=False)]
EVERY = [*CHOICES.values(), *HOST, OUTPUT, replace(OUTPUT, mlp=False), Keep(attention=False), Keep(mlp=False, chunk=5),
         Keep(False, False, chunk=5)]
STREAM = Outline(layers=(), hidden=8, vocabulary=100, itemsize=2, embedding=0, embedding_moves=False, head=0,
                 head_trains=False, others=0, trained=0, optimizer=0)


def storages(value: Any, found: dict[int, int]) -> dict[int, int]:
    """Bytes of the distinct memory behind all tensors in a value; what is parked lies elsewhere."""
    if isinstance(value, Tensor):
        found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    elif isinstance(value, list | tuple):
        for part in value:
            storages(part, found)
    elif type(value) in (Attended, Expanded):
        storages(list(vars(value).values()), found)
    return found


@pytest.mark.parametrize("keep", EVERY, ids=str)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama3"])
def test_what_is_kept(family: str, keep: Keep) -> None:
    """Exactly, but for what attention keeps for itself, which depends on its kernel."""
    model = accelerate(adapt(make(family, 1)))
    layer, T = engine_layer(swapped_layers(model)[0]), 12
    outline = outline_of(model).layers[0]
    layer.keep = keep
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, layer.spec.hidden, generator=generator)
    cos, sin = torch.rand(2, T, layer.spec.head_dim, generator=generator)
    whole_row = Rows(1, T, uniform=True, cu_seqlens=torch.tensor([0, T], dtype=torch.int32), sizes=(T,))
    rotary = layer.spec.rotary
    way = Pass(layer, Call(whole_row, cos if rotary else None, sin if rotary else None, training=True, seeds=None))
    with torch.no_grad():
        way.forward_keeping(x)
    held = {name: value for name, value in vars(way).items() if name not in ("layer", "call", "below")}
    if keep.host:
        held["x"] = held["mid"] = None  # on a CPU there is nowhere else to go
    sums = 4 * T * layer.spec.heads if keep.attention else 0
    assert sum(storages(list(held.values()), {}).values()) == footprint(outline, keep, T, 4).kept - sums


def random_layer(seed: int) -> LayerOutline:
    draw = random.Random(seed)
    kv_heads = draw.choice([1, 2, 8])
    spec = DecoderSpec(hidden=draw.choice([512, 2048]), intermediate=draw.choice([1024, 6144]),
                       heads=kv_heads * draw.choice([1, 4]), kv_heads=kv_heads, head_dim=draw.choice([64, 128]),
                       eps=1e-6, attention_scale=0.1, qk_norm=draw.random() < 0.5, post_norms=draw.random() < 0.5,
                       residual_scale=draw.choice([1.0, 0.5]))
    borders = draw.choice([(0, 0, 0, 0), (64, 64, 64, 64), (64, 0, 128, 64)])
    return LayerOutline(spec, borders, 0, (0, 0, 0, 0), draw.choice([0, 10**6]), "nf4")


@pytest.mark.parametrize("seed", range(20))
def test_what_must_hold_for_any_layer(seed: int) -> None:
    layer, T, itemsize = random_layer(seed), 4096, 2
    stream = T * layer.spec.hidden * itemsize

    def of(attention: bool, mlp: bool, **options: Any) -> Any:
        return footprint(layer, Keep(attention, mlp, **options), T, itemsize)

    for host in (False, True):
        kept = {(attention, mlp): of(attention, mlp, host=host).kept for attention in (True, False)
                for mlp in (True, False)}
        assert kept[True, True] > kept[True, False] > kept[False, False]
        assert kept[True, True] > kept[False, True] > kept[False, False]
        # Each half is what it is, whatever becomes of the other; the stream between them comes with either.
        between = 0 if host else stream
        assert kept[True, True] + kept[False, False] + between == kept[True, False] + kept[False, True]
    for attention, mlp in ((True, True), (True, False), (False, True), (False, False)):
        here, there = of(attention, mlp), of(attention, mlp, host=True)
        assert here.kept - there.kept == there.parked == stream * (2 if attention or mlp else 1)
        assert there.forward == here.forward + there.parked and there.backward > here.backward
        assert here.parked == 0
    for mlp in (True, False):  # attention waits there too, and the stream between the halves does not
        near, far = of(True, mlp, host=True), of(True, mlp, host=True, attention_host=True)
        branch = stream if layer.spec.post_norms else 0  # which comes again with the stream
        assert near.kept - far.kept == far.parked - stream + branch > 0
        # On its way is what the layer below sent; what this one sends is still here.
        assert far.forward - near.forward == far.parked - near.parked + far.parked - stream
    # What is not kept is made again in the backward pass.
    assert of(False, False).backward >= of(False, True).backward > of(True, True).backward - 1
    assert of(False, False).backward >= of(True, False).backward >= of(True, True).backward
    # Only what down has made of a token stays where nothing of the stream does.
    assert footprint(layer, OFFLOAD, T, itemsize).kept == T * itemsize * layer.borders[3]


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_smaller_chunks_take_less(seed: int, attention: bool) -> None:
    layer, T = random_layer(seed), 16384
    whole = footprint(layer, Keep(attention, mlp=False), T, 2)
    assert footprint(layer, Keep(attention, mlp=False, chunk=T), T, 2) == whole
    assert footprint(layer, Keep(attention, mlp=False, chunk=10 * T), T, 2) == whole
    chunked = [footprint(layer, Keep(attention, mlp=False, chunk=T // 2**power), T, 2) for power in range(1, 6)]
    for one, less in itertools.pairwise(chunked):
        assert less.forward <= one.forward and less.backward <= one.backward
    assert {one.kept for one in chunked} == {whole.kept}
    assert chunked[-1].forward < whole.forward or not attention
    # Where gate and up are kept, the MLP takes all tokens at once.
    assert footprint(layer, Keep(attention, chunk=64), T, 2) == footprint(layer, Keep(attention), T, 2)


def test_the_head() -> None:
    """T = 10, H = 8, V = 100 in two bytes: 160 for all hidden states, 16 for those of a token, 200 for its logits."""
    assert head_footprint(STREAM, Batch(10, 4, 10)) == 160 + (160 + 2 * 64 + 4 * 200)
    assert head_footprint(STREAM, Batch(10, 0, 10)) == 160 + 2 * 160
    assert head_footprint(replace(STREAM, head_trains=True), Batch(10, 4, 10)) == 160 + 1088 + 800 * (4 + 2)
    chunk = 256 * 2**20
    assert chunk == loss.CHUNK_BYTES
    wide = replace(STREAM, vocabulary=128256, hidden=4096)
    stream = 8192 * 4096 * 2
    assert head_footprint(wide, Batch(8192, 8192, 8192)) == 4 * stream + chunk


def test_figures_of_a_layer() -> None:
    """H = 8, F = 16, one head of 4 columns for all, R = 2; ten tokens in two bytes, counted by what a pass makes."""
    spec = DecoderSpec(hidden=8, intermediate=16, heads=1, kv_heads=1, head_dim=4, eps=1e-6, attention_scale=0.5)
    layer = LayerOutline(spec, (2, 2, 2, 2), 0, (0, 0, 0, 0), 1000, "nf4")
    x, qkv, out, z, sums, gate_up = 160, 240, 80, 40, 40, 640 + 40
    rstd = 40
    attended, expanded = qkv + z + out + z + sums + rstd, gate_up + z
    kept = [footprint(layer, keep, 10, 2).kept for keep in (KEEP, Keep(mlp=False), ALL, OFFLOAD)]
    assert kept == [2 * x + attended + expanded + rstd + z, 2 * x + attended + z, x + z, z]
    # Backward: the stream's gradient, those of what is trained, and of the attention those of q, k and v twice and the
    # norm's, or of the MLP h and dh, which are more only where gate and up are made again.
    stream, inner, attention = 160 + 40, 320, 2 * (240 + 40) + 160
    assert footprint(layer, KEEP, 10, 2).backward == stream + 1000 + attention
    assert footprint(layer, Keep(mlp=False), 10, 2).backward == stream + 1000 + 2 * inner + expanded
    assert footprint(layer, ALL, 10, 2).backward == stream + 1000 + 2 * inner + expanded + attended + x
    # Where what adapters need of h is summed as it is made, there is dh alone, and the sums.
    summed = footprint(replace(layer, sums=7), ALL, 10, 2).backward
    assert summed == stream + 1000 + inner + 7 + expanded + attended + x
    chunked = footprint(layer, replace(ALL, chunk=8), 10, 2)
    assert chunked.backward == stream + 1000 + (2 * inner + expanded) * 8 // 10 + attended + x


def test_what_attention_works_in() -> None:
    """Four heads of 4 on one of keys: the output's gradient and those of q, k and v, of q in four bytes as well, and of
    k and v for every head."""
    spec = DecoderSpec(hidden=8, intermediate=16, heads=4, kv_heads=1, head_dim=4, eps=1e-6, attention_scale=0.5)
    layer = LayerOutline(spec, (2, 2, 2, 2), 0, (0, 0, 0, 0), 1000, "nf4")
    q, kv, stream = 320, 160, 160 + 40
    assert footprint(layer, KEEP, 10, 2).backward == stream + 1000 + q + (q + kv) + 2 * q + 2 * q
    # FlexAttention, which soft-caps run by, needs none of this: dq, dk, dv twice, and the norm's.
    capped = replace(layer, spec=replace(spec, softcap=50.0))
    assert footprint(capped, KEEP, 10, 2).backward == stream + 1000 + 2 * (q + kv + 40) + 160


GPU_CHOICES = {**CHOICES, "attention": Keep(attention=False), "chunked": replace(ALL, chunk=2048),
               "attention kept, chunked": Keep(mlp=False, chunk=2048), "away": AWAY,
               "away, mlp": replace(AWAY, mlp=False), "output": OUTPUT, "output away": OUTPUT_AWAY}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore")  # torch.compile's, by which attention with soft-caps runs
@pytest.mark.parametrize("name", GPU_CHOICES)
@pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma2"])
def test_the_peak_of_a_step(family: str, name: str) -> None:
    """Forward and backward of six layers and the head, above what lies there anyway, within 5 %.

    How many copies to the host are under way at the peak depends on how long layers take. All that there can be are
    counted: with these small layers, less is used.
    """
    keep, lengths = GPU_CHOICES[name], (1024,) * 8
    model = adapt(make(family, 0, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6,
                       num_attention_heads=8, num_key_value_heads=2, head_dim=128, max_position_embeddings=2048),
                  r=16).to("cuda", torch.bfloat16)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    accelerate(model)
    add_gradients_in_place(model, True)  # as the trainer does, from the second step on here
    for module in swapped_layers(model):
        module.gazelle.keep = keep
    batch = packed(rows(0, lengths), "cuda") | {"uniform": True}
    labelled = int((batch["labels"] != -100).sum())
    size = Batch(sum(lengths), labelled, max(lengths))
    peaks = []
    with packed_attention_on(model):
        for _ in range(3):  # gradients, scratch and pinned memory are there after the first
            model.zero_grad(set_to_none=False)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            batch_loss(model, batch)[0].backward()
            torch.cuda.synchronize()
            peaks.append(torch.cuda.max_memory_allocated() - before)
    outline = outline_of(model)
    draft = _Draft(outline, size, None, [keep], embedding_on_host=False)
    positions = 4 * size.tokens * outline.layers[0].spec.head_dim * outline.itemsize
    predicted = draft.activations([keep] * len(outline.layers)) + positions
    assert (0.75 if keep.host else 0.95) * predicted <= peaks[-1] <= 1.05 * predicted
