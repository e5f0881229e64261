"""How long a sequence the model can take, and stretching it by rotary scaling."""

from typing import TYPE_CHECKING, Any

from gazelle.base.errors import OptionError
from gazelle.base.log import logger

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DEFAULT_LENGTH = 2048


def fit_context(config: "PretrainedConfig", max_seq_length: int | None) -> int:
    """The sequence length to use, in tokens; scales the rotary embedding in `config` if the model is shorter.

    The scaling is linear (position interpolation, https://arxiv.org/abs/2306.15595) by length / limit. A length left
    out (None) is 2048, or the model's own limit if that is shorter.

    Raises:
        OptionError: not a positive number, or longer than a model can be stretched to.
    """
    config = config.get_text_config()
    limit = context_limit(config)
    if max_seq_length is None:
        return min(DEFAULT_LENGTH, limit) if limit else DEFAULT_LENGTH
    if isinstance(max_seq_length, bool) or not isinstance(max_seq_length, int) or max_seq_length < 1:
        raise OptionError("the sequence length must be a positive whole number", where="max_seq_length",
                          found=max_seq_length, expected="a number of tokens such as 2048", fix="change max_seq_length")
    if limit is None or max_seq_length <= limit:
        return max_seq_length
    rope: dict[str, Any] | None = getattr(config, "rope_parameters", None)
    if not rope or not can_stretch(config):
        kind = "no rotary embedding" if not rope else rope.get("rope_type", "a different rule for each kind of layer")
        raise OptionError("the model cannot be stretched to this length", where="max_seq_length",
                          found=f"{max_seq_length:,} tokens, rotary scaling: {kind}", expected=f"at most {limit:,}",
                          fix=f"set max_seq_length to {limit} or less")
    factor = max_seq_length / limit
    config.rope_parameters = rope | {"rope_type": "linear", "factor": factor}
    config.max_position_embeddings = max_seq_length
    logger.info("Stretching the model from %d to %d tokens by linear rotary scaling, factor %.3g.", limit,
                max_seq_length, factor)
    return max_seq_length


def can_stretch(config: "PretrainedConfig") -> bool:
    """Whether `fit_context` can make the model longer: it has rotary positions that are not scaled yet."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return bool(rope.get("rope_type") == "default")


def context_limit(config: "PretrainedConfig") -> int | None:
    """The longest sequence the model was made for, in tokens, or None if it has no limit."""
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if limit and rope.get("rope_type") == "yarn":  # some checkpoints state the length before the stretch
        limit = max(limit, int(rope["factor"] * rope.get("original_max_position_embeddings", limit)))
    return limit
