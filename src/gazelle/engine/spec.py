"""What one decoder layer computes, as data. Every supported family is this one flow with its own switches:

    x → norm → qkv → (qk-norm) → rope → attention → o → (post-norm) → + x
      → norm → gate|up → act·mul → down → (post-norm) → +
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class DecoderSpec:
    """The switches of one layer.

    Attributes:
        hidden: width of the residual stream.
        intermediate: width of the gate and of the up projection.
        heads: query heads.
        kv_heads: key-value heads; `heads` is a multiple of it.
        head_dim: size of a head.
        eps: of every norm in the layer.
        attention_scale: what attention scores are multiplied by.
        norm_offset: added to norm weights: 1 for the Gemma families, whose weights are kept around 0.
        activation: of the gate: "silu", "gelu_tanh" or "gelu".
        qk_norm: each query and key head is normalised before its rotation (Qwen3, Gemma 3).
        post_norms: what attention and MLP give is normalised before it is added (Gemma 2 and 3).
        residual_scale: what attention and MLP give is multiplied by this before it is added (Granite).
        rotary: False for layers without positions (one in four of SmolLM3).
        window: tokens a token sees, itself included; None for all before it.
        softcap: attention scores become softcap · tanh(score / softcap) (Gemma 2).
        attention_dropout: of attention weights, in training.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    attention_scale: float
    norm_offset: float = 0.0
    activation: str = "silu"
    qk_norm: bool = False
    post_norms: bool = False
    residual_scale: float = 1.0
    rotary: bool = True
    window: int | None = None
    softcap: float | None = None
    attention_dropout: float = 0.0

    @property
    def q_size(self) -> int:
        """Columns of the queries."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of the keys, and of the values."""
        return self.kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Columns of queries, keys and values together."""
        return self.q_size + 2 * self.kv_size
