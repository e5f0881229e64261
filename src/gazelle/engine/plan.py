"""The memory plan: what every layer keeps, so that a step fits in a budget and loses as little time as possible.

A layer that keeps more has less to make again. Where everything lies on the device, `engine.search` finds the fastest
choice of every layer; only if there is none does the MLP take its tokens in chunks, and only then do weights stream.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from gazelle.engine.footprint import Footprint, footprint, head_footprint
from gazelle.engine.keep import ALL, ATTENTION, AWAY, KEEP, MLP, OUTPUT, OUTPUT_AWAY, Keep
from gazelle.engine.outline import Batch, Outline
from gazelle.engine.search import Option, fastest, least
from gazelle.engine.stream import BUFFERS

CHUNKS = (16384, 8192, 4096, 2048, 1024)  # tokens that the MLP takes at a time where nothing else fits


@dataclass(frozen=True)
class Rates:
    """What one layer takes, in seconds: its passes with everything kept, and what is made again if it is not.

    Attributes:
        forward, backward: of a layer that keeps everything.
        attention, mlp: making again what these halves would have kept.
        qkv: making queries, keys and values again, a part of `attention`.
        head: the loss head, forward and backward.
        link: bytes a second between host and device; 0 if there is no host memory apart.
        rest: what a step takes besides: the optimizer, and what runs between the layers.
    """

    forward: float
    backward: float
    attention: float
    qkv: float
    mlp: float
    head: float
    link: float
    rest: float = 0.0

    def scaled(self, factor: float) -> "Rates":
        """For `factor` times as many tokens."""
        return replace(self, forward=self.forward * factor, backward=self.backward * factor, mlp=self.mlp * factor,
                       attention=self.attention * factor, qkv=self.qkv * factor, head=self.head * factor)


@dataclass(frozen=True)
class Plan:
    """What a run is to do, and what that should take.

    Attributes:
        keeps: a choice for each layer.
        streamed: how many layers' weights come from host memory, the first ones of the model.
        embedding_on_host: the embedding's weight lies in host memory.
        parts: predicted peak by part, in bytes.
        peak: their sum.
        seconds: predicted time of a micro-batch, forward and backward; None if nothing was measured.
        budget: bytes that it had to fit in.
    """

    keeps: tuple[Keep, ...]
    streamed: int
    embedding_on_host: bool
    parts: dict[str, int]
    peak: int
    seconds: float | None
    budget: int

    def lines(self) -> list[tuple[str, str]]:
        """(part, predicted memory) from the largest to the smallest, and the sum."""
        ranked = sorted(self.parts.items(), key=lambda item: -item[1])
        sizes = [*((name, size) for name, size in ranked if size), ("peak", self.peak)]
        return [(name, f"{size / 1e9:.2f} GB") for name, size in sizes]

    def describe(self) -> str:
        """In words, such as "20 layers keep everything, 12 layers make gate and up again"."""
        counts: dict[str, int] = {}
        for keep in self.keeps:
            counts[_words(keep)] = counts.get(_words(keep), 0) + 1
        said = [f"{count} layers {words}" if count > 1 else f"1 layer {words.replace(' ', 's ', 1)}"
                for words, count in counts.items()]
        if self.streamed:
            said.append(f"the weights of {self.streamed} stream from host memory")
        if self.embedding_on_host:
            said.append("the embedding lies in host memory")
        return ", ".join(said)


class TooSmallError(Exception):
    """No plan fits. `smallest` is the smallest budget that would do, in bytes."""

    def __init__(self, smallest: int) -> None:
        super().__init__(smallest)
        self.smallest = smallest


def make_plan(outline: Outline, batch: Batch, budget: int, rates: Rates | None, *, host: bool = True,
              allowed: Callable[[Keep], bool] | None = None, streams: bool = True,
              host_memory: int | None = None) -> Plan:
    """The fastest plan whose predicted peak is within the budget.

    Args:
        outline: the model.
        batch: the largest micro-batch.
        budget: bytes of device memory.
        rates: measured times, or None to go by floating-point operations.
        host: there is host memory apart from the device's, to move things to.
        allowed: which choices may be made; all without it.
        streams: weights of layers may stream from host memory.
        host_memory: bytes that may be used there; None for as many as it takes.

    Raises:
        TooSmallError: nothing fits.
    """
    drafts: list[_Draft] = []
    known = rates or by_operations(outline, batch)
    # FlexAttention is compiled: what it saves for its backward pass cannot be sent away.
    leaves = all(layer.spec.softcap is None for layer in outline.layers)

    def fastest_of(chunks: list[int | None], embeddings: list[bool], streamed: int = 0) -> Plan | None:
        # To make queries, keys and values again is worth trying only where that is the smaller part of the attention.
        tried = [_Draft(outline, batch, rates, options, embedding_on_host=embedding, streamed=streamed,
                        host_memory=host_memory)
                 for chunk in chunks for embedding in embeddings
                 if (options := choices(host=host, away=leaves, parts=known.qkv < known.attention / 2, chunk=chunk,
                                        allowed=allowed))]
        drafts.extend(tried)
        plans = []
        for draft in tried:
            if (plan := draft.plan(budget)) is not None:
                plans.append((plan, draft))
                if set(plan.keeps) == {KEEP}:  # nothing is faster
                    break
        return min(plans, key=lambda found: found[1].seconds(found[0].keeps))[0] if plans else None

    moves = [False, True] if host and outline.embedding_moves else [False]
    pieces = [chunk for chunk in CHUNKS if chunk < batch.tokens]
    for chunk in (None, *pieces):
        if plan := fastest_of([chunk], moves):
            return plan
    last_resort, count = [None, *pieces[-1:]], len(outline.layers)
    for streamed in range(1, count + 1) if host and streams else ():
        if plan := fastest_of(last_resort, moves[-1:], streamed):
            # Where layers take long, weights arrive unnoticed, and what they leave free is worth more.
            more = {streamed + part * (count - streamed) // 8 for part in (1, 2, 4, 8)} - {streamed}
            others = (fastest_of(last_resort, moves[-1:], number) for number in sorted(more))
            return min([plan, *filter(None, others)], key=lambda found: found.seconds or 0.0)
    sizes = [size for draft in drafts if (size := draft.smallest()) is not None]
    if not sizes:  # only what lies on the host was allowed, and there is too little of that to be sure
        return make_plan(outline, batch, budget, rates, host=host, allowed=allowed, streams=streams)
    raise TooSmallError(min(sizes))


def choices(*, host: bool, away: bool = True, parts: bool = True, chunk: int | None = None,
            allowed: Callable[[Keep], bool] | None = None) -> list[Keep]:
    """All that a layer may choose from.

    Args:
        host: there is host memory apart.
        away: attention's tensors may leave for it.
        parts: with `away`, the attention's output may be kept alone.
        chunk: tokens that the MLP takes at a time where gate and up are not kept.
        allowed: which choices may be made.
    """
    found = [replace(keep, host=there) for there in ([False, True] if host else [False])
             for keep in (KEEP, MLP, ATTENTION, ALL)]
    if host and away:
        found += [replace(keep, mlp=mlp) for keep in (AWAY, OUTPUT, OUTPUT_AWAY)[: 3 if parts else 1]
                  for mlp in (True, False)]
    return [replace(keep, chunk=None if keep.mlp else chunk) for keep in found if allowed is None or allowed(keep)]


class _Draft:
    """A plan in the making: where embedding, weights and chunks are is settled, what the layers keep is not."""

    def __init__(self, outline: Outline, batch: Batch, rates: Rates | None, options: list[Keep], *,
                 embedding_on_host: bool, streamed: int = 0, host_memory: int | None = None) -> None:
        self.outline, self.batch, self.options, self.host_memory = outline, batch, options, host_memory
        self.measured = rates is not None
        self.rates = rates or by_operations(outline, batch)
        self.embedding_on_host, self.streamed = embedding_on_host, streamed
        self.stream = batch.tokens * outline.hidden * outline.itemsize
        self.static = self._static()

    def plan(self, budget: int) -> Plan | None:
        """The fastest within the budget; None if there is none."""
        found, everything = [], [KEEP] * len(self.outline.layers)
        if KEEP in self.options and sum(self.static.values()) + self.activations(everything) <= budget:
            found.append(everything)
        for options in [] if found else self._uses_of_host():
            numbers = fastest(self._layers(options), self._head(options), budget - sum(self.static.values()))
            if numbers is not None:
                found.append([options[number] for number in numbers])
        found = [keeps for keeps in found if self.host_memory is None or self._on_host(keeps) <= self.host_memory]
        if not found:
            return None
        keeps = min(found, key=self.seconds)
        parts = self.static | {"activations": self.activations(keeps)}
        seconds = self.seconds(keeps) if self.measured else None
        return Plan(tuple(keeps), self.streamed, self.embedding_on_host, parts, sum(parts.values()), seconds, budget)

    def smallest(self) -> int | None:
        """The smallest budget for which there is a plan; None if it might take more host memory than there is."""
        count = len(self.outline.layers)
        uses = [options for options in self._uses_of_host() if self.host_memory is None or self._on_host(
            [max(options, key=lambda keep: self._footprint(keep).parked)] * count) <= self.host_memory]
        sizes = [least(self._layers(options), self._head(options)) for options in uses]
        return sum(self.static.values()) + min(sizes) if sizes else None

    def activations(self, keeps: Sequence[Keep]) -> int:
        """The most that lies on the device besides what stays, at any point of a step."""
        kept, most = 0, 0
        used = list(dict.fromkeys(keeps))
        for options, keep in zip(self._layers(used), keeps, strict=True):
            option = options[used.index(keep)]
            most = max(most, kept + option.most())
            kept += option.kept
        return max(most, kept + self._head(keeps))

    def seconds(self, keeps: Sequence[Keep]) -> float:
        """Predicted time of a micro-batch."""
        rates, count = self.rates, len(keeps)
        computing = count * (rates.forward + rates.backward) + sum(self._cost(keep) for keep in keeps)
        if self.streamed and rates.link:
            moved = sum(layer.weights for layer in self.outline.layers[: self.streamed]) / rates.link
            # Weights of the streamed layers come one after another while these layers compute.
            computing += max(0.0, moved - self.streamed * rates.forward) \
                + max(0.0, moved - self.streamed * rates.backward)
        return computing + rates.head + rates.rest

    def _uses_of_host(self) -> list[list[Keep]]:
        """Options by how much they send to the host: what is still on its way there takes room beside the head."""
        sent = {keep: self._footprint(keep).parked for keep in self.options}
        return [[keep for keep in self.options if sent[keep] <= most] for most in sorted(set(sent.values()))]

    def _on_host(self, keeps: Sequence[Keep]) -> int:
        """Bytes in host memory."""
        weights = sum(layer.weights for layer in self.outline.layers[: self.streamed])
        parked = sum(footprint(layer, keep, self.batch.tokens, self.outline.itemsize).parked
                     for layer, keep in zip(self.outline.layers, keeps, strict=True))
        return parked + weights + (self.outline.embedding if self.embedding_on_host else 0)

    def _head(self, keeps: Sequence[Keep]) -> int:
        return self._sent(keeps) + head_footprint(self.outline, self.batch)

    def _sent(self, keeps: Sequence[Keep]) -> int:
        """The most that a layer with one of these choices sends to the host."""
        return max(self._footprint(keep).parked for keep in keeps)

    def _footprint(self, keep: Keep) -> Footprint:
        return footprint(self.outline.layers[0], keep, self.batch.tokens, self.outline.itemsize)

    def _layers(self, keeps: Sequence[Keep]) -> list[list[Option]]:
        """Of every layer, what each choice needs, if the others have these to choose from too."""
        outline = self.outline
        costs = [round(self._cost(keep) * 1e12) for keep in keeps]
        prints = {kind: [footprint(kind, keep, self.batch.tokens, outline.itemsize) for keep in keeps]
                  for kind in set(outline.layers)}
        sent = self._sent(keeps)

        def needs(one: Footprint, cost: int) -> Option:
            # While a layer computes, what the one below sent is on its way, there or back; its own footprint counts as
            # much as it sends itself.
            more = sent - one.parked
            return Option(one.kept, one.forward + self.stream + more, one.backward + more, cost)

        return [[needs(one, cost) for one, cost in zip(prints[kind], costs, strict=True)] for kind in outline.layers]

    def _cost(self, keep: Keep) -> float:
        """Seconds that a choice costs a layer, above keeping everything."""
        rates = self.rates
        attention = (0 if keep.qkv else rates.qkv) if keep.attention else rates.attention
        again = attention + (0 if keep.mlp else rates.mlp)
        if not keep.host or not rates.link:
            return again
        if keep.attention_host:  # the product behind attention is made again: so much of the one before it
            spec = self.outline.layers[0].spec
            again += rates.qkv * spec.q_size / spec.qkv_size
        # Copies run beside the computation; what cannot hide there is waited for. Never quite free.
        transfer = self._footprint(keep).parked / rates.link
        waited = max(0.0, transfer - rates.forward) + max(0.0, transfer - rates.backward - again)
        return again + waited + 0.02 * transfer

    def _static(self) -> dict[str, int]:
        outline = self.outline
        weights = [layer.weights for layer in outline.layers]
        resident = sum(weights[self.streamed :])
        if self.streamed:
            resident += min(BUFFERS, self.streamed) * max(weights[: self.streamed])
        rotary = 4 * self.batch.tokens * outline.layers[0].spec.head_dim * outline.itemsize
        return {
            "weights of the layers": resident,
            "embedding and head": (0 if self.embedding_on_host else outline.embedding) + outline.head,
            "dequantised weights": sum(max(sizes) for sizes in zip(*self._scratch(), strict=True)),
            "trained parameters and gradients": outline.trained,
            "optimizer": outline.optimizer,
            "norms, positions and the rest": outline.others + rotary,
        }

    def _scratch(self) -> list[tuple[int, ...]]:
        """Of each layer, what its projections need in scratch memory: also those that stream, and have no W̃ to keep."""
        layers, itemsize = self.outline.layers, self.outline.itemsize
        streamed = [tuple(size or whole for size, whole in zip(layer.scratch, layer.matrices(itemsize), strict=True))
                    for layer in layers[: self.streamed]]
        return [*streamed, *(layer.scratch for layer in layers[self.streamed :])]


def by_operations(outline: Outline, batch: Batch) -> Rates:
    """Relative times of a layer by its floating-point operations, where nothing was measured."""
    spec = outline.layers[0].spec
    linear = 2.0 * batch.tokens * spec.hidden
    attention = linear * (spec.qkv_size + spec.q_size) + 2.0 * batch.tokens * batch.longest * spec.q_size
    mlp = linear * 2 * spec.intermediate
    down = linear * spec.intermediate
    unit = 1e-14
    forward = (attention + mlp + down) * unit
    return Rates(forward, 2 * forward, attention * unit, linear * spec.qkv_size * unit, mlp * unit, 0.0, 5e10)


def _words(keep: Keep) -> str:
    again = {(True, True): "keep everything", (True, False): "make gate and up again",
             (False, True): "make the attention again", (False, False): "make everything again"}
    words = again[keep.attention, keep.mlp]
    if keep.attention and not keep.qkv:
        words = "make queries, keys and values again" if keep.mlp else "keep the attention's output alone"
    if keep.chunk is not None:
        words += f" ({keep.chunk} tokens at a time)"
    if keep.attention_host:
        return words + " with inputs and attention in host memory"
    return words + (" from inputs in host memory" if keep.host else "")
