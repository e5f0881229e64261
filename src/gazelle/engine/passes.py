"""One decoder layer, forward and backward, written by hand so that we decide what is kept between the two.

Shapes: T tokens, H hidden, F intermediate, D head size, N and R outputs and adapter columns of a projection.
"""

import weakref
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gazelle.engine.attended import Attended, Remote
from gazelle.engine.layer import Call, Layer
from gazelle.engine.linear import Bordered, Gradients, Projection
from gazelle.engine.offload import Parked, park
from gazelle.engine.spec import DecoderSpec
from gazelle.kernels.activation import gated, gated_backward, gated_backward_sums
from gazelle.kernels.attention import Rows, attention
from gazelle.kernels.factors import NO_SUMS, Normed, Sums
from gazelle.kernels.norm import rms_norm, rms_norm_backward, rms_norm_weight_grad
from gazelle.kernels.rotary import rotate_, rotate_into


def run_layer(layer: Layer, x: Tensor, rows: Rows, cos: Tensor | None, sin: Tensor | None,
              training: bool = True) -> Tensor:
    """The output [T, H] of a layer, differentiable.

    Args:
        layer: its weights.
        x: [T, H], rows end to end.
        rows: where rows begin.
        cos, sin: [T, Dr] of the rotation; None for a layer without.
        training: False leaves out dropout.
    """
    call = Call(rows, cos, sin, training, layer.seeds(x.device) if training else None)
    if torch.is_grad_enabled() and (x.requires_grad or layer.trainable):
        return _LayerFunction.apply(x, layer, call, *layer.trainable)
    return Pass(layer, call).forward(x)


@dataclass
class Expanded:
    """The MLP half: gate and up [T, 2F + R], their z, and what down gave if that is normalised before it is added."""

    gate_up: Tensor
    z: Tensor | None
    rstd: Tensor  # of the norm before
    branch: Tensor | None = None


class Pass:
    """One way through a layer: forward now, backward later."""

    def __init__(self, layer: Layer, call: Call) -> None:
        self.layer, self.call = layer, call
        self.x: Tensor | Parked | None = None
        self.mid: Tensor | Parked | None = None
        self.attended: Attended | None = None
        self.expanded: Expanded | None = None
        # z of the down projection, by span. Always kept: it is small, and made again from what the backward pass has
        # it would differ in its last bits.
        self.z_down: list[Tensor | None] = []
        self.below: weakref.ref[Pass] | None = None

    # Forward

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output [T, H]; nothing is kept."""
        self.layer.arrive(forward=True)
        attended = self._attend(x, differentiable=False)
        mid = self._add_attention(attended, x)
        del attended
        return self._mlp(mid, keep=False)

    def forward_keeping(self, x: Tensor) -> Tensor:
        """The same, and keep what `layer.keep` says."""
        keep, shared = self.layer.keep, self.layer.shared
        self.layer.arrive(forward=True)
        # What attention drops is drawn from torch's generator: it cannot be drawn again.
        keep_attention = keep.attention or (self.call.training and self.layer.spec.attention_dropout > 0)
        leaves = keep.attention and (keep.attention_host or not keep.qkv)
        attended = self._attend(x, differentiable=keep_attention, remote=leaves)
        mid = self._add_attention(attended, x)
        kept: list[Any] = [x, mid] if keep.attention or keep.mlp else [x]
        if leaves:  # at once, so that copies have as long as there is
            kept[0] = attended.leave(x, qkv=keep.qkv, host=keep.attention_host)
        if keep.attention_host:
            kept = kept[:1]
        elif keep.host:
            kept = park(*kept)
        self.x, self.mid = (*kept, None)[:2]
        if keep_attention:
            self.attended = attended
        del attended
        y = self._mlp(mid, keep=keep.mlp)
        self.below, shared.last = shared.last, weakref.ref(self)
        return y

    def fetch(self) -> None:
        """Begin to bring back what lies on the host."""
        for tensor in (self.x, self.mid):
            if isinstance(tensor, Parked):
                tensor.fetch()
        if self.attended is not None:
            self.attended.fetch()

    def _attend(self, x: Tensor, *, differentiable: bool, remote: bool = False) -> Attended:
        spec, call = self.layer.spec, self.call
        whole, (q, k, v), z_qkv, rstd, rstds = self._project(x, self.layer.qkv.matrix())

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, call.rows, spec.attention_scale, spec.window, spec.softcap,
                             spec.attention_dropout if call.training else 0.0)

        if remote:
            way = Remote()
            return Attended(z_qkv, rstd, rstds, (*whole, way(attend, q, k, v)), way)
        with torch.set_grad_enabled(differentiable):
            q, k, v = (part.detach().requires_grad_(differentiable) for part in (q, k, v))
            return Attended(z_qkv, rstd, rstds, (*whole, attend(q, k, v)), (q, k, v))

    def _project(self, x: Tensor, W: Bordered) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor, Tensor],
                                                        Tensor | None, Tensor, tuple[Tensor, Tensor] | None]:
        """Tensors that queries, keys and values are views of, these themselves, z, and the factors of the norm before
        and of those of queries and keys.
        """
        layer, spec = self.layer, self.layer.spec
        entry = layer.qkv.input(x.shape[0])
        _, rstd = rms_norm(x, layer.norms.attention, spec.eps, spec.norm_offset, out=entry[:, : spec.hidden])
        qkv, z = layer.qkv.forward(entry, W, seed=self.call.seed(0))
        q, k, v, rstds = self._positioned(qkv)
        return (qkv,) if rstds is None else (qkv, q, k), (q, k, v), z, rstd, rstds

    def _add_attention(self, attended: Attended, x: Tensor) -> Tensor:
        """The stream [T, H] between attention and MLP."""
        layer = self.layer
        entry = layer.o.enter(attended.out.detach().flatten(1))
        mid, attended.z_o, attended.branch = self._join(layer.o, entry, layer.norms.after_attention, x,
                                                        self.call.seed(1))
        return mid

    def _positioned(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """q [T, heads, D], k and v [T, kv_heads, D], normalised and rotated, and the factors of their norms. Where
        there are none, q and k are views of qkv, rotated there.
        """
        spec, call = self.layer.spec, self.call
        q, k, v = heads(qkv, spec)
        rstds = None
        if spec.qk_norm:
            q, q_rstd = rms_norm(q, cast(Tensor, self.layer.norms.query), spec.eps, spec.norm_offset)
            k, k_rstd = rms_norm(k, cast(Tensor, self.layer.norms.key), spec.eps, spec.norm_offset)
            rstds = (q_rstd, k_rstd)
        if call.cos is not None and call.sin is not None:
            if rstds is not None:
                rotate_(q, call.cos, call.sin)
                rotate_(k, call.cos, call.sin)
            else:
                together = qkv[:, : spec.q_size + spec.kv_size].unflatten(1, (-1, spec.head_dim))
                rotate_(together, call.cos, call.sin)
        return q, k, v, rstds

    def _mlp(self, mid: Tensor, *, keep: bool) -> Tensor:
        """The layer's output [T, H] from the stream between attention and MLP."""
        layer, spec = self.layer, self.layer.spec
        spans = self._spans(len(mid), keep=keep)
        outputs = []
        self.z_down = []
        W = layer.gate_up.matrix()
        for span in spans:
            expanded = self._expand(mid[span], W)
            h = layer.down.input(len(mid[span]))
            gated(expanded.gate_up[:, : layer.gate_up.N], spec.activation, out=h[:, : spec.intermediate])
            if keep:
                self.expanded = expanded
            y, z_down, expanded.branch = self._join(layer.down, h, layer.norms.after_mlp, mid[span], self.call.seed(3))
            outputs.append(y)
            self.z_down.append(z_down)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _spans(self, T: int, *, keep: bool) -> list[slice]:
        """The rows that the MLP takes at a time."""
        chunk = self.layer.keep.chunk
        if keep or chunk is None or self.call.seeds is not None:  # a mask belongs to all rows of a projection
            return [slice(0, T)]
        return [slice(at, min(at + chunk, T)) for at in range(0, T, chunk)]

    def _expand(self, mid: Tensor, W: Bordered) -> Expanded:
        """Gate and up of a normalised [T, H]."""
        layer, spec = self.layer, self.layer.spec
        entry = layer.gate_up.input(mid.shape[0])
        _, rstd = rms_norm(mid, layer.norms.mlp, spec.eps, spec.norm_offset, out=entry[:, : spec.hidden])
        gate_up, z = layer.gate_up.forward_wide(entry, W, seed=self.call.seed(2))
        return Expanded(gate_up, z, rstd)

    def _join(self, projection: Projection, entry: Tensor, after: Tensor | None, residual: Tensor,
              seed: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """residual + scale · norm(projection(entry)), the projection's z, and its output if it is normalised."""
        spec = self.layer.spec
        W = projection.matrix()
        if after is None and spec.residual_scale == 1:
            y, z = projection.forward(entry, W, residual=residual, seed=seed)
            return y, z, None
        branch, z = projection.forward(entry, W, seed=seed)
        if after is None:
            return torch.add(residual, branch, alpha=spec.residual_scale), z, None
        normed, _ = rms_norm(branch, after, spec.eps, spec.norm_offset)
        return normed.mul_(spec.residual_scale).add_(residual), z, branch

    # Backward

    def backward(self, dy: Tensor, grads: Gradients, *, wants_input: bool) -> Tensor | None:
        """The gradient of x [T, H], in the buffer that the layers share."""
        self.fetch()
        if (below := self.below() if self.below is not None else None) is not None:
            below.fetch()
        if self.x is None:
            raise RuntimeError("a second backward pass through the same forward pass: the engine keeps nothing for it, "
                               "also with retain_graph=True; run the forward pass again")
        self.layer.arrive(forward=False)
        x = self.x.get() if isinstance(self.x, Parked) else self.x
        mid = self.mid.get() if isinstance(self.mid, Parked) else self.mid
        if self.attended is None:
            self.attended = self._attend(x, differentiable=True)
        self.attended.back()
        if mid is None:
            mid = self._add_attention(self.attended, x)
        stream = self._stream(dy)
        W = self.layer.gate_up.matrix(again=True)
        spans = self._spans(len(mid), keep=self.expanded is not None)
        for span, z_down in zip(spans, self.z_down, strict=True):
            self._mlp_backward(stream[span], mid[span], W, z_down, grads)
        self.expanded, self.z_down = None, []
        del mid
        self._attention_backward(stream, x, self.attended, grads, wants_input=wants_input)
        self.x = self.mid = self.attended = None
        return stream[:, : self.layer.spec.hidden] if wants_input else None

    def _stream(self, dy: Tensor) -> Tensor:
        """dy in a buffer [T, H + R] that has room for the adapters' columns. It is changed in place from here on."""
        layer, shared = self.layer, self.layer.shared
        width = layer.spec.hidden + max(layer.o.R, layer.down.R)
        held = shared.gradient
        if held is not None and held.shape[1] >= width and held.data_ptr() == dy.data_ptr() \
                and held.stride() == dy.stride():
            return held
        begun = shared.begin(len(dy), layer.spec.hidden, dy)
        begun[:, : layer.spec.hidden].copy_(dy)
        return begun

    def _branch_gradient(self, stream: Tensor, projection: Projection, after: Tensor | None, branch: Tensor | None,
                         grads: Gradients) -> Tensor:
        """The gradient [T, N + R] of what `projection` gave, from that of the sum it was added to."""
        spec = self.layer.spec
        if after is None and spec.residual_scale == 1:
            return stream[:, : projection.N + projection.R]
        d = projection.output(stream.shape[0])
        inner = d[:, : projection.N]
        torch.mul(stream[:, : projection.N], spec.residual_scale, out=inner)
        if after is not None and branch is not None:
            _, rstd = rms_norm(branch, after, spec.eps, spec.norm_offset)
            if grads.wants(after):
                grads.add(after, rms_norm_weight_grad(inner, branch, rstd))
            inner.copy_(rms_norm_backward(inner, branch, after, rstd, spec.norm_offset))
        return d

    def _mlp_backward(self, stream: Tensor, mid: Tensor, W: Bordered, z_down: Tensor | None,
                      grads: Gradients) -> None:
        layer, spec, call = self.layer, self.layer.spec, self.call
        expanded, T = self.expanded, len(stream)
        if expanded is None:
            expanded = self._expand(mid, W)
        gate_up = expanded.gate_up
        W_down = layer.down.matrix(again=True)
        if layer.norms.after_mlp is not None and expanded.branch is None:
            entry = layer.down.input(T)
            gated(gate_up[:, : layer.gate_up.N], spec.activation, out=entry[:, : spec.intermediate])
            expanded.branch, _ = layer.down.forward(entry, W_down, seed=call.seed(3))
            del entry
        d = self._branch_gradient(stream, layer.down, layer.norms.after_mlp, expanded.branch, grads)
        dh = layer.down.input_gradient(d, W_down, call.seed(3))
        pair = gate_up[:, : layer.gate_up.N]
        h: Tensor | None = None
        if (sums := self._summed_with_activation(pair, dh, expanded.z, d[:, layer.down.N :], grads)) is None:
            h = torch.empty_like(dh)
            gated_backward(pair, dh, spec.activation, pair, h)
        of_down, of_gate_up = sums or (NO_SUMS, NO_SUMS)
        layer.down.parameter_gradients(d, h, W_down, z_down, grads, call.seed(3), of_down)
        del h, dh
        dn = layer.gate_up.input_gradient(gate_up, W, call.seed(2))
        normed = Normed(mid, layer.norms.mlp, spec.eps, spec.norm_offset, expanded.rstd)
        layer.gate_up.parameter_gradients(gate_up, normed, W, expanded.z, grads, call.seed(2), of_gate_up)
        self._norm_backward(dn, normed, stream, grads)

    def _summed_with_activation(self, pair: Tensor, dh: Tensor, z: Tensor | None, dz_down: Tensor,
                                grads: Gradients) -> tuple[Sums, Sums] | None:
        """The activation's backward pass in place, with the sums over h for the factors of down and over its result for
        those of gate and up. None if not all of these are to be had at once: then nothing has been done.
        """
        layer, call = self.layer, self.call
        of_down, of_gate_up = layer.down.targets(grads, call.seed(3)), layer.gate_up.targets(grads, call.seed(2))
        if z is None or not of_down or not of_gate_up or (columns := layer.sum_columns) is None:
            return None
        a, b = gated_backward_sums(pair, dh, layer.spec.activation, z, dz_down, of_gate_up, columns[0])
        return Sums(a=a), Sums(b=b)

    def _attention_backward(self, stream: Tensor, x: Tensor, attended: Attended, grads: Gradients, *,
                            wants_input: bool) -> None:
        layer, spec, call = self.layer, self.layer.spec, self.call
        branch = attended.branch
        if layer.norms.after_attention is not None and branch is None:
            self._add_attention(attended, x)
            branch = attended.branch
        d = self._branch_gradient(stream, layer.o, layer.norms.after_attention, branch, grads)
        W = layer.o.matrix(again=True)
        dout = layer.o.input_gradient(d, W, call.seed(1))
        layer.o.parameter_gradients(d, attended.out.detach().flatten(1), W, attended.z_o, grads, call.seed(1))
        if not attended.has_qkv:
            attended.whole = (*self._project(x, layer.qkv.matrix(again=True))[0], attended.out)
        dq, dk, dv = attended.gradients(dout.view(attended.out.shape))
        del dout
        dqkv = self._positioned_backward(dq, dk, dv, attended, grads)
        if not (wants_input or any(True for _ in layer.qkv.trainable()) or grads.wants(layer.norms.attention)):
            return
        W = layer.qkv.matrix(again=True)
        dn = layer.qkv.input_gradient(dqkv, W, call.seed(0))
        normed = Normed(x, layer.norms.attention, spec.eps, spec.norm_offset, attended.rstd)
        layer.qkv.parameter_gradients(dqkv, normed, W, attended.z_qkv, grads, call.seed(0))
        self._norm_backward(dn, normed, stream, grads)

    def _positioned_backward(self, dq: Tensor, dk: Tensor, dv: Tensor, attended: Attended, grads: Gradients) -> Tensor:
        """The gradient [T, N + R] of what the qkv projection gave."""
        layer, spec, call = self.layer, self.layer.spec, self.call
        d = layer.qkv.output(dq.shape[0])
        inner = d[:, : spec.qkv_size]
        if call.cos is not None and call.sin is not None:
            rotate_into(dq, dk, dv, call.cos, call.sin, out=inner)
        else:
            torch.cat((dq.flatten(1), dk.flatten(1), dv.flatten(1)), 1, out=inner)
        if attended.rstds is not None:
            weights = (cast(Tensor, layer.norms.query), cast(Tensor, layer.norms.key))
            for grad, raw, weight, rstd in zip(heads(inner, spec)[:2], heads(attended.whole[0], spec)[:2], weights,
                                               attended.rstds, strict=True):
                if grads.wants(weight):
                    grads.add(weight, rms_norm_weight_grad(grad.flatten(0, 1), raw.flatten(0, 1), rstd.flatten()))
                grad.copy_(rms_norm_backward(grad, raw, weight, rstd, spec.norm_offset))
        return d

    def _norm_backward(self, dn: Tensor, normed: Normed, stream: Tensor, grads: Gradients) -> None:
        """Add the gradient of a norm's input to the stream's."""
        x, weight, rstd = normed.x, normed.weight, normed.rstd
        if grads.wants(weight):
            grads.add(weight, rms_norm_weight_grad(dn, x, rstd))
        inner = stream[:, : self.layer.spec.hidden]
        rms_norm_backward(dn, x, weight, rstd, normed.offset, residual=inner, out=inner)


def heads(qkv: Tensor, spec: DecoderSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Views [T, heads, D] of queries, keys and values in [T, N]."""
    q, k, v = qkv.split((spec.q_size, spec.kv_size, spec.kv_size), 1)
    return (q.unflatten(1, (-1, spec.head_dim)), k.unflatten(1, (-1, spec.head_dim)),
            v.unflatten(1, (-1, spec.head_dim)))


class _LayerFunction(torch.autograd.Function):
    """Autograd's view of a layer: one node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, call: Call, *_: Tensor) -> Tensor:
        layer.shared.gradient = None
        way = Pass(layer, call)
        ctx.way, ctx.layer = way, layer
        with torch.autocast(x.device.type, enabled=False):
            return way.forward_keeping(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        layer: Layer = ctx.layer
        grads = Gradients(layer.trainable, in_place=layer.shared.in_place)
        with torch.autocast(dy.device.type, enabled=False):
            dx = ctx.way.backward(dy, grads, wants_input=ctx.needs_input_grad[0])
        return dx, None, None, *(grads.of(tensor) for tensor in layer.trainable)
