"""What is measured: model shapes with random weights, and the rows of the table with what they are to reach.

Random weights cost what trained ones cost. GB is 2**30 bytes everywhere in the benchmarks.
"""

from dataclasses import dataclass, field, replace
from typing import Any

GB = 2**30


@dataclass(frozen=True)
class Shape:
    """A model. `family` is the beginning of its classes' names in transformers."""

    name: str
    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    tied: bool
    extra: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """Arguments of the family's config."""
        return {"hidden_size": self.hidden, "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "vocab_size": self.vocab,
                "max_position_embeddings": self.context, "tie_word_embeddings": self.tied, "bos_token_id": 1,
                "eos_token_id": 2, **self.extra}

    @property
    def parameters(self) -> int:
        """Weights in all; norms and biases, a few in a million, are left out."""
        head = self.hidden // self.heads
        attention = self.hidden * head * (2 * self.heads + 2 * self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def targets(self) -> list[str]:
        """All linear modules of a layer."""
        if self.family == "Phi3":
            return ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
        return ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

    def tiny(self) -> "Shape":
        """The same family in a size for trying the benchmarks themselves."""
        return replace(self, hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, vocab=4096)


LLAMA3: dict[str, Any] = {"rope_theta": 500000.0}
SHAPES = {shape.name: shape for shape in (
    Shape("llama8b", "Llama", 4096, 14336, 32, 32, 8, 128256, 131072, False, LLAMA3),
    Shape("llama1b", "Llama", 2048, 8192, 16, 32, 8, 128256, 131072, True, LLAMA3),
    Shape("phi3mini", "Phi3", 3072, 8192, 32, 32, 32, 49152, 4096, False,
          {"original_max_position_embeddings": 4096, "pad_token_id": 2}),
    # The same with linear modules apart: the form in which Unsloth hands out Phi-3.
    Shape("phi3llama", "Mistral", 3072, 8192, 32, 32, 32, 49152, 4096, False, {"sliding_window": None}),
    Shape("smol135m", "Llama", 576, 1536, 30, 9, 3, 49152, 8192, True, {"rope_theta": 100000.0}),
    Shape("qwen14b", "Qwen2", 5120, 13824, 48, 40, 8, 152064, 32768, False, {"rope_theta": 1e6}),
)}


@dataclass(frozen=True)
class Peer:
    """Another library, through TRL's SFTTrainer. Liger is Hugging Face with Liger's kernels.

    `models`: (ours, its own) where the library has a form of its own for a model.
    """

    name: str
    library: str
    checkpointing: bool = True
    models: tuple[tuple[str, str], ...] = ()

    def shape(self, row: "Row") -> Shape:
        return SHAPES[dict(self.models).get(row.model, row.model)]


PEERS = {peer.name: peer for peer in (
    Peer("hf", "hf"), Peer("liger", "liger"),
    Peer("unsloth", "unsloth", models=(("phi3mini", "phi3llama"),)), Peer("unsloth-keep", "unsloth", False),
)}


@dataclass(frozen=True)
class Row:
    """A case: LoRA of rank 16 on all linear modules. Limits and targets are gazelle's, on one H200.

    Attributes:
        storage: of the frozen weights, "nf4" or "bf16".
        batch: rows in a batch; with `packing`, bins of `sequence` tokens.
        sequence: longest row, and in a "dense" workload every row, in tokens.
        workload: "dense", or "short": lengths from a log-normal distribution, as instruction data has them.
        precision: what gazelle computes in; peers compute in bf16.
        budget: memory that gazelle is told to stay within, in GB; None leaves it all of the GPU's.
        target: least tokens/s; of a short workload, real tokens, without padding.
        peak, load, first_step: most GB, seconds of loading, seconds from the start of loading to the end of a step.
        share: (row, part): least part of the tokens/s of another row.
        peers: names in `PEERS`.
        steps, warmup: steps taken, and how many of them the figures leave out.
    """

    name: str
    label: str
    model: str
    storage: str
    batch: int
    sequence: int
    workload: str = "dense"
    packing: bool = False
    precision: str = "auto"
    budget: float | None = None
    target: int | None = None
    peak: float | None = None
    load: float | None = None
    first_step: float | None = None
    share: tuple[str, float] | None = None
    peers: tuple[str, ...] = ()
    steps: int = 14
    warmup: int = 6

    @property
    def shape(self) -> Shape:
        return SHAPES[self.model]

    def quick(self) -> "Row":
        """With fewer steps, for a first look."""
        return replace(self, steps=min(self.steps, 7), warmup=min(self.warmup, 4))

    def tiny(self) -> "Row":
        """The same path through the code in a second on a CPU. Its figures say nothing."""
        return replace(self, batch=min(self.batch, 2), sequence=64, steps=4, warmup=2)


ROWS = {row.name: row for row in (
    Row("8b-nf4", "8B NF4, 4×2048", "llama8b", "nf4", 4, 2048, budget=7.4, target=12_900, peak=7.4, load=3.5,
        first_step=7.0, peers=("unsloth", "hf", "liger")),
    Row("8b-nf4-16gb", "8B NF4, 4×2048, 16 GiB", "llama8b", "nf4", 4, 2048, budget=16, target=15_500, peak=16),
    Row("8b-nf4-36gb", "8B NF4, 4×2048, 36 GiB", "llama8b", "nf4", 4, 2048, budget=36, target=18_400, peak=36,
        peers=("unsloth-keep",)),
    Row("8b-nf4-fp8", "8B NF4 in fp8, 4×2048, 36 GiB", "llama8b", "nf4", 4, 2048, precision="fp8", budget=36,
        target=27_000, peak=36),
    Row("8b-bf16", "8B bf16, 4×2048", "llama8b", "bf16", 4, 2048, budget=16.9, target=13_600, peak=16.9,
        peers=("unsloth",)),
    Row("8b-nf4-short", "8B NF4, short rows packed to 4×2048", "llama8b", "nf4", 4, 2048, workload="short",
        packing=True, target=14_000, peers=("unsloth",)),
    # As many rows as fill about as many real tokens as the packed batch has.
    Row("8b-nf4-short-unpacked", "8B NF4, 40 short rows", "llama8b", "nf4", 40, 2048, workload="short",
        target=14_000, peers=("unsloth",)),
    Row("8b-nf4-65536", "8B NF4, 1×65536", "llama8b", "nf4", 1, 65536, budget=12, target=7_000, peak=12,
        peers=("unsloth",), steps=4, warmup=1),
    Row("phi3mini-nf4", "Phi-3-mini NF4, 4×2048", "phi3mini", "nf4", 4, 2048, budget=4, target=22_500, peak=4,
        peers=("unsloth", "hf")),
    Row("llama1b-bf16", "1B bf16, 4×2048", "llama1b", "bf16", 4, 2048, target=105_000, peers=("unsloth", "hf")),
    Row("smol135m-bf16", "135M bf16, 8×512", "smol135m", "bf16", 8, 512, target=450_000, peers=("unsloth", "hf"),
        steps=40, warmup=12),
    Row("qwen14b-nf4", "14B NF4, 1×2048, all weights resident", "qwen14b", "nf4", 1, 2048),
    Row("qwen14b-nf4-7gb", "14B NF4, 1×2048, 7 GiB", "qwen14b", "nf4", 1, 2048, budget=7, peak=7,
        share=("qwen14b-nf4", 0.5)),
)}


def missed(row: Row, result: dict[str, Any], others: dict[str, float]) -> list[str]:
    """What a result of gazelle's fails of what its row asks for; `others`: tokens/s of gazelle in other rows."""
    limits = [("peak_gb", row.peak), ("load_s", row.load), ("first_step_s", row.first_step)]
    least = [row.target, row.share and others.get(row.share[0], 0) * row.share[1]]
    found = [f"{name} > {limit:g}" for name, limit in limits if limit is not None and result[name] > limit]
    return found + [f"tokens/s < {bound:,.0f}" for bound in least if bound and result["tokens_per_second"] < bound]
