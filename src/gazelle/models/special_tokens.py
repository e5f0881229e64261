"""A pad token that is not EOS, and one set of special ids in tokenizer, config and generation config."""

from typing import TYPE_CHECKING

from gazelle.base.errors import DataError, ModelError
from gazelle.base.log import logger, say_once
from gazelle.data.spans import Renderer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

# In order of preference. All are unused in conversations of the families that have them.
_SPARE = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>", "[UNK]")
_NEW = "<|pad|>"


def align_special_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Choose a pad token if there is none or it is EOS, pad on the right, and bring all configs in line, in place.

    With EOS as padding, a model is taught to ignore the token it should end with. The vocabulary grows by `<|pad|>`
    only if it has no spare special token, and the embedding only if it has no spare row.

    Raises:
        ModelError: the tokenizer has no EOS token, or more tokens than the embedding has rows.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end-of-sequence token", where=str(tokenizer.name_or_path), found="none",
                         expected="eos_token in tokenizer_config.json", fix="set eos_token in tokenizer_config.json")
    if len(tokenizer) > rows:
        raise ModelError("the tokenizer does not belong to this model", where=str(tokenizer.name_or_path),
                         found=f"{len(tokenizer):,} tokens", expected=f"at most the embedding's {rows:,} rows",
                         fix="use the tokenizer that came with the model")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        _choose_pad(model, tokenizer, rows)
    tokenizer.padding_side = "right"

    generation = model.generation_config
    stops = stop_ids(generation)
    if tokenizer.eos_token_id not in stops:
        stops.insert(0, tokenizer.eos_token_id)
    for config in (model.config.get_text_config(), generation):
        if config is not None:
            config.pad_token_id = tokenizer.pad_token_id
            config.bos_token_id = tokenizer.bos_token_id
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    if generation is not None:
        generation.eos_token_id = stops if len(stops) > 1 else stops[0]
    stop_at_end_of_turn(model, tokenizer)


def stop_ids(generation: "GenerationConfig | None") -> list[int]:
    """The EOS ids of a generation config, which states none, one or several."""
    stops = generation.eos_token_id if generation is not None else None
    return list(stops) if isinstance(stops, list) else [] if stops is None else [stops]


def stop_at_end_of_turn(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Let generation stop at the token that ends an answer in the chat template, in place.

    That token need not be EOS: base models with a borrowed template would run on past their answer.
    """
    generation = model.generation_config
    if generation is None or not tokenizer.chat_template:
        return
    try:
        closing = Renderer(tokenizer).closing
    except DataError as error:  # some templates take no plain question and answer; such a model still loads
        say_once(f"generation stops at {tokenizer.eos_token} alone: {error.what}")
        return
    if not closing:
        return
    end = tokenizer(closing, add_special_tokens=False)["input_ids"][-1]
    stops = stop_ids(generation)
    if end not in stops:
        generation.eos_token_id = [*stops, end]


def _choose_pad(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: int) -> None:
    vocabulary = tokenizer.get_vocab()
    reserved = sorted(token for token in vocabulary if token.startswith("<|reserved_special_token_"))
    taken = (tokenizer.eos_token, tokenizer.bos_token)
    spare = next((token for token in (*_SPARE, *reserved) if token in vocabulary and token not in taken), None)
    tokenizer.pad_token = spare or _NEW
    if spare is None:
        tokenizer.add_special_tokens({"pad_token": _NEW})
        if len(tokenizer) > rows:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            logger.info("The vocabulary has no spare token to pad with: added %s.", _NEW)
