"""How much memory a layer and the loss head take, by what `engine.passes` and `engine.loss` allocate.

A change there belongs here too; `tests/engine/test_footprint.py` compares the two on a GPU.

Shapes: T tokens, H hidden, F intermediate, R adapter columns. All results in bytes.
"""

from dataclasses import dataclass

from gazelle.engine.keep import Keep
from gazelle.engine.loss import CHUNK_BYTES
from gazelle.engine.outline import Batch, LayerOutline, Outline


@dataclass(frozen=True)
class Footprint:
    """A layer with one choice: what stays until its backward pass, and the most its passes need besides."""

    kept: int
    forward: int
    backward: int
    parked: int = 0  # what waits in host memory meanwhile


def footprint(layer: LayerOutline, keep: Keep, T: int, itemsize: int) -> Footprint:
    """Of one layer.

    Args:
        layer: the layer.
        keep: its choice.
        T: tokens.
        itemsize: of the type of computation.
    """
    spec = layer.spec
    H, F, Q, QK = spec.hidden, spec.intermediate, spec.q_size, spec.q_size + spec.kv_size
    R_qkv, R_o, R_gate_up, R_down = layer.borders
    rows = T if keep.mlp or keep.chunk is None else min(T, keep.chunk)

    stream = T * H * itemsize
    # Besides numbers of the type of computation: sums of exponentials, and factors of norms.
    heads, out = T * itemsize * (spec.qkv_size + (QK if spec.qk_norm else 0)), T * itemsize * Q
    attended = heads + out + T * itemsize * (R_qkv + R_o) + T * 4 * (spec.heads + 1)
    if spec.qk_norm:
        attended += T * 4 * (spec.heads + spec.kv_heads)
    if spec.post_norms:
        attended += stream
    again = 0 if keep.qkv or not keep.attention else heads  # what is there in passes alone
    leaves = heads - again + out if keep.attention_host else 0  # what waits in host memory
    expanded = T * itemsize * (2 * F + 2 * R_gate_up) + T * 4 + (stream if spec.post_norms else 0)
    # The input, and the stream between the halves, or what that is made of again.
    between = leaves or (stream if keep.attention or keep.mlp else 0)
    parked = stream + between if keep.host else 0
    kept = T * itemsize * R_down + (expanded if keep.mlp else 0) + (0 if keep.host else stream + between)
    if keep.attention:
        kept += attended - again - leaves - (stream if spec.post_norms and keep.attention_host else 0)

    entry = rows * itemsize * (H + R_gate_up)
    gate_up = rows * itemsize * (2 * F + 2 * R_gate_up)
    inner = rows * itemsize * F
    branch = rows * itemsize * (H + R_down) if spec.post_norms or spec.residual_scale != 1 else 0
    # Forward: the input (counted as kept by the layer below or by this one), the stream between, the output.
    outputs = stream if rows == T else 2 * stream
    forward = outputs + (0 if keep.mlp else gate_up) + inner + rows * itemsize * R_down + branch
    attending = T * itemsize * (H + R_qkv) + (again if keep.attention else attended)
    # And what leaves, and what the layer below sent, on their way to the host.
    forward = max(forward, attending) + stream + leaves + parked

    fixed = T * itemsize * (H + max(R_o, R_down)) + layer.gradients
    if keep.host:  # this layer's and the next one's, which is on its way
        fixed += 2 * parked + stream
    if not keep.attention:
        fixed += attended
    mlp = max(inner + (layer.sums or inner), entry) + branch
    if not keep.mlp:
        mlp += gate_up + (branch if spec.post_norms else 0)
    if keep.attention_host or not (keep.attention or keep.mlp):  # the stream between the halves, made again
        mlp += stream
    if keep.attention_host and spec.post_norms:
        fixed += stream
    # dout with dq, dk, dv and what the kernel works in: sums of dq in float32, dk and dv of every query head. Then dq,
    # dk, dv with what they become before the projection, and dn.
    attending = T * itemsize * (Q + spec.qkv_size)
    if spec.softcap is None and itemsize == 2:
        attending += T * (4 * Q + (2 * itemsize * Q if spec.kv_heads < spec.heads else 0))
    attention = again + max(attending, T * itemsize * (2 * (spec.qkv_size + R_qkv) + H))
    return Footprint(kept, forward, fixed + max(mlp, attention), parked)


def head_footprint(outline: Outline, batch: Batch) -> int:
    """The most that the final norm, the loss head and their backward pass take."""
    H, V, itemsize = outline.hidden, outline.vocabulary, outline.itemsize
    stream, labelled = batch.tokens * H * itemsize, batch.labelled * H * itemsize
    logits = min(CHUNK_BYTES, batch.labelled * V * itemsize)
    trained = V * H * (4 + itemsize) if outline.head_trains else 0
    return stream + max(stream + 2 * labelled + logits, 2 * labelled + 2 * stream) + trained
