"""Answers from a model: many at once for evaluation, or one piece by piece for a conversation."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import OptionError
from gazelle.models.modes import evaluating
from gazelle.models.special_tokens import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]


def generate_texts(model: Any, tokenizer: "PreTrainedTokenizerBase", conversations_or_prompts: Sequence[Messages | str],
                   *, max_new_tokens: int, batch_size: int = 32, temperature: float = 0.0) -> list[str]:
    """One answer for each conversation or prompt, in their order, without special tokens.

    Batches hold inputs of similar length, padded on the left. Generation stops at any of the model's EOS tokens. The
    model is put back into the mode it was in.

    Args:
        model: a causal language model, with or without an adapter.
        tokenizer: its tokenizer.
        conversations_or_prompts: messages, to which the chat template adds the assistant's turn, or plain texts.
        max_new_tokens: tokens an answer may have.
        batch_size: inputs at a time.
        temperature: 0 takes the likeliest token each time, more draws at random.

    Raises:
        OptionError: a number out of range, or messages for a tokenizer without a chat template.
    """
    from transformers import GenerationConfig

    _check(max_new_tokens, batch_size, temperature)
    prompts = [encode_prompt(tokenizer, item) for item in conversations_or_prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    stops = end_tokens(model, tokenizer)
    # Padding is masked; any token will do where the tokenizer has none for it.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=temperature > 0, use_cache=True, eos_token_id=stops or None,
        pad_token_id=pad, **({"temperature": temperature, "top_k": 0} if temperature > 0 else {}))
    answers = [""] * len(prompts)
    with _answering(model, config):
        for start in range(0, len(order), batch_size):
            chosen = order[start:start + batch_size]
            ids, mask = _pad_left([prompts[i] for i in chosen], pad, model.device)
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            for i, row in zip(chosen, output[:, ids.shape[1]:].tolist(), strict=True):
                # A token that ends the answer is no part of it, though not every one of them is a special token.
                end = next((at for at, token in enumerate(row) if token in stops), len(row))
                answers[i] = tokenizer.decode(row[:end], skip_special_tokens=True)
    return answers


def stream_text(model: Any, tokenizer: "PreTrainedTokenizerBase", messages: Messages | str, *, max_new_tokens: int,
                temperature: float = 0.0, top_p: float = 1.0) -> Iterator[str]:
    """Pieces of one answer as they come; a character that spans tokens comes whole.

    Args:
        model: a causal language model, with or without an adapter.
        tokenizer: its tokenizer.
        messages: the conversation so far, or a plain text to go on with.
        max_new_tokens: tokens the answer may have.
        temperature: 0 takes the likeliest token each time, more draws at random.
        top_p: draw from the likeliest tokens that hold this share of the probability together.

    Raises:
        OptionError: a number out of range, or messages for a tokenizer without a chat template.
    """
    _check(max_new_tokens, 1, temperature)
    if not 0 < top_p <= 1:
        raise OptionError("a value out of range", where="top_p", found=top_p, expected="above 0 and at most 1",
                          fix="change top_p")
    ids = torch.tensor([encode_prompt(tokenizer, messages)], device=model.device)
    return _stream(model, tokenizer, ids, max_new_tokens, temperature, top_p)


def _stream(model: Any, tokenizer: "PreTrainedTokenizerBase", ids: torch.Tensor, max_new_tokens: int,
            temperature: float, top_p: float) -> Iterator[str]:
    stops = set(end_tokens(model, tokenizer))
    answer: list[int] = []
    said, cache = "", None
    for _ in range(max_new_tokens):
        # Modes are set for each step alone: between two steps the caller's code runs.
        with _answering(model):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = _choose(output.logits[0, -1].float(), temperature, top_p)
        if token in stops:
            break
        cache, ids = output.past_key_values, torch.tensor([[token]], device=ids.device)
        answer.append(token)
        text = tokenizer.decode(answer, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            yield text[len(said):]
            said = text
    rest = tokenizer.decode(answer, skip_special_tokens=True)[len(said):]
    if rest:
        yield rest


def _choose(logits: torch.Tensor, temperature: float, top_p: float) -> int:
    if temperature == 0:
        return int(logits.argmax())
    chances, tokens = (logits / temperature).softmax(-1).sort(descending=True)
    chances = chances.masked_fill(chances.cumsum(-1) - chances >= top_p, 0)
    return int(tokens[torch.multinomial(chances, 1)])


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", item: Messages | str) -> list[int]:
    """Ids of a plain text, or of messages to which the chat template adds the assistant's turn.

    Raises:
        OptionError: messages for a tokenizer without a chat template.
    """
    if isinstance(item, str):
        ids: list[int] = tokenizer(item)["input_ids"]
        # A prompt rendered with the chat template brings its first token along; once is enough.
        bos = tokenizer.bos_token_id
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids
    if not tokenizer.chat_template:
        raise OptionError("the tokenizer has no chat template", where="tokenizer", found="messages",
                          expected="plain texts, or a tokenizer with a chat template",
                          fix="set tokenizer.chat_template, or pass the prompts as text")
    return tokenizer.apply_chat_template(item, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]


def _pad_left(rows: list[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """([rows, longest] ids, [rows, longest] mask)."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def end_tokens(model: Any, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that end an answer."""
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*stop_ids(model.generation_config), *own]))


def _check(max_new_tokens: int, batch_size: int, temperature: float) -> None:
    for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("batch_size", batch_size, 1),
                               ("temperature", temperature, 0)):
        if not value >= least:
            raise OptionError("a value out of range", where=name, found=value, expected=f"at least {least}",
                              fix=f"change {name}")


@contextlib.contextmanager
def _answering(model: Any, config: Any = None) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in."""
    # generate() fills what `config` leaves open from the model's own settings, such as a repetition penalty.
    owner = unwrap(model)
    earlier = owner.generation_config
    try:
        if config is not None:
            owner.generation_config = config
        with torch.no_grad(), evaluating(model):
            yield
    finally:
        owner.generation_config = earlier
