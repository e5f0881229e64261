"""Chat templates for tokenizers that bring none: which there are, and which one a tokenizer can take."""

from pathlib import Path
from typing import Any

from gazelle.base.errors import ModelError, OptionError, nearest

# Template -> the tokens it writes that must be single tokens of the vocabulary.
TEMPLATES = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "phi-3": ("<|user|>", "<|assistant|>", "<|end|>"),
    "phi-4": ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "mistral": ("[INST]", "[/INST]"),
    "qwen": ("<|im_start|>", "<|im_end|>"),
}
ALIASES = {
    **dict.fromkeys(("llama3", "llama-3.1", "llama-3.2", "llama-3.3"), "llama-3"),
    **dict.fromkeys(("phi3", "phi-3.5"), "phi-3"), "phi4": "phi-4",
    **dict.fromkeys(("gemma2", "gemma-2", "gemma3", "gemma-3"), "gemma"),
    **dict.fromkeys(("qwen2", "qwen2.5", "qwen-2.5", "qwen3", "qwen-3"), "qwen"),
}
# Start of a model type -> templates to try first. Phi-4 checkpoints have the model type "phi3".
FAMILIES = {"llama": ("llama-3",), "qwen": ("qwen",), "phi3": ("phi-4", "phi-3"), "gemma": ("gemma",),
            "mistral": ("mistral",), "mixtral": ("mistral",), "ministral": ("mistral",)}
# For any other model; phi-4 before chatml, whose tokens it contains.
GENERAL = ("phi-4", "chatml", "llama-3", "phi-3", "gemma")


def get_template(name: str) -> str:
    """The Jinja text of a template by name.

    Raises:
        OptionError: no such template.
    """
    return (Path(__file__).parent / "templates" / f"{_known(name)}.jinja").read_text(encoding="utf-8")


def choose_template(tokenizer: Any, model_type: str) -> str | None:
    """The first template, the model's own family first, whose tokens are all in the vocabulary; else None."""
    family = next((names for start, names in FAMILIES.items() if model_type.startswith(start)), ())
    vocabulary = tokenizer.get_vocab()
    return next((name for name in (*family, *GENERAL)
                 if all(token in vocabulary for token in TEMPLATES[name])), None)


def ensure_template(tokenizer: Any, model_type: str, name: str | None = None) -> None:
    """Give `tokenizer` a chat template.

    Args:
        tokenizer: changed in place, unless it has a template of its own and `name` is None.
        model_type: as in config.json, such as "llama".
        name: a template of `TEMPLATES`, or the Jinja text of another one.

    Raises:
        OptionError: no template of that name.
        ModelError: the tokenizer lacks the tokens of the template, or of every template.
    """
    if name is None and tokenizer.chat_template:
        return
    if name is not None and ("{%" in name or "{{" in name):
        tokenizer.chat_template = name
        return
    fitting = choose_template(tokenizer, model_type)
    chosen = fitting if name is None else _known(name)
    vocabulary = tokenizer.get_vocab()
    missing = {key: [token for token in tokens if token not in vocabulary] for key, tokens in TEMPLATES.items()}
    if chosen is None or missing[chosen]:
        lacking = missing if chosen is None else {chosen: missing[chosen]}
        raise ModelError("the tokenizer has no chat template, and none fits its vocabulary" if chosen is None else
                         f"the chat template {chosen!r} does not fit this tokenizer", where="chat_template",
                         found="missing " + "; ".join(f"{', '.join(lack)} for {key}" for key, lack in lacking.items()),
                         expected="a vocabulary with the tokens that open and close a turn",
                         fix=f"use chat_template={fitting!r}" if fitting else
                         "start from the instruct version of the model, or give a Jinja template as chat_template=")
    tokenizer.chat_template = get_template(chosen)


def _known(name: str) -> str:
    key = ALIASES.get(name.lower(), name.lower())
    if key not in TEMPLATES:
        raise OptionError(f"there is no chat template {name!r}", where="chat_template", found=name,
                          expected="one of " + ", ".join(TEMPLATES), fix=nearest(key, [*TEMPLATES, *ALIASES]))
    return key
