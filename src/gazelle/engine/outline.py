"""What a model needs memory for, in numbers alone: enough to plan a run without any weights.

Shapes: T tokens of a micro-batch, n of them labelled, R adapter columns of a projection. All sizes in bytes.
"""

from dataclasses import dataclass

from gazelle.engine.spec import DecoderSpec


@dataclass(frozen=True)
class LayerOutline:
    """One decoder layer.

    Attributes:
        spec: what it computes.
        borders: R of its four projections: qkv, o, gate and up, down.
        weights: its frozen weights, as they are kept.
        scratch: each projection's matrix W̃ once it is dequantised; 0 for one that is kept so.
        gradients: of what is trained in it.
        storage: how most of its weights are kept: "nf4", "int8" or "dense".
        sums: of what the MLP's adapters need of h, which is summed where h is made, so that h is kept nowhere; 0 for a
            layer where h is.
        bordered: W̃ has the adapters' columns on its right too, as it has on all devices but a CPU.
    """

    spec: DecoderSpec
    borders: tuple[int, int, int, int]
    weights: int
    scratch: tuple[int, int, int, int]
    gradients: int
    storage: str
    sums: int = 0
    bordered: bool = True

    def matrices(self, itemsize: int) -> tuple[int, int, int, int]:
        """Each projection's matrix W̃ in the type of computation."""
        spec = self.spec
        shapes = ((spec.qkv_size, spec.hidden), (spec.hidden, spec.q_size), (2 * spec.intermediate, spec.hidden),
                  (spec.hidden, spec.intermediate))
        qkv, o, gate_up, down = ((N + R) * (K + R * self.bordered) * itemsize
                                 for (N, K), R in zip(shapes, self.borders, strict=True))
        return qkv, o, gate_up, down


@dataclass(frozen=True)
class Outline:
    """A model with what is trained in it.

    Attributes:
        layers: from the first to the last.
        hidden, vocabulary: sizes of the head.
        itemsize: of the type of computation.
        embedding: its weight.
        embedding_moves: it can lie in host memory while the model trains.
        head: its weight; 0 if it is the embedding's.
        head_trains: the head's weight has a gradient.
        others: norms, buffers and whatever else lies on the device.
        trained: values and gradients of what is trained.
        optimizer: the optimizer's state.
    """

    layers: tuple[LayerOutline, ...]
    hidden: int
    vocabulary: int
    itemsize: int
    embedding: int
    embedding_moves: bool
    head: int
    head_trains: bool
    others: int
    trained: int
    optimizer: int


@dataclass(frozen=True)
class Batch:
    """A micro-batch: its tokens, how many of them are labelled, and its longest row."""

    tokens: int
    labelled: int
    longest: int
