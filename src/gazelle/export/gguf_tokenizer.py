"""A tokenizer as the metadata of a GGUF file: its vocabulary, how it splits text, its special tokens, its template.

llama.cpp has two kinds that matter here. "gpt2" is byte-level BPE by merges; how text is split first is known to it by
a name. "llama" is SentencePiece's BPE by scores. Facts: llama.cpp's src/llama-vocab.cpp and conversion/base.py.
"""

import json
from typing import Any

from gazelle.base.errors import ModelError
from gazelle.base.log import logger
from gazelle.models.gguf_tokenizer import LLAMA3_SPLIT, QWEN2_SPLIT

Fields = dict[str, Any]
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_CASED = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
          r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
          r"|%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_BYTES, _GPT2_BYTES = ("bytes", False, False), ("bytes", False, True)
# The steps of a pre-tokenizer, and whether whole words skip the merges (None: as it likes) -> llama.cpp's name.
_SPLITS: dict[tuple[tuple[Any, ...], bool | None], str] = {
    ((_GPT2_BYTES,), False): "gpt-2",
    ((("digits", True), _GPT2_BYTES), False): "smollm",
    ((("split", LLAMA3_SPLIT), _BYTES), True): "llama-bpe",
    ((("split", LLAMA3_SPLIT), _BYTES), False): "smaug-bpe",
    ((("split", QWEN2_SPLIT), _BYTES), False): "qwen2",
    ((("split", _CASED % (_ENDINGS, _ENDINGS, r"\p{N}{1,3}")), _BYTES), None): "gpt-4o",
    ((("split", _CASED % ("", "", r"\p{N}")), _BYTES), None): "tekken",
}


def tokenizer_fields(tokenizer: Any, size: int, ends: list[int]) -> Fields:
    """The metadata of a tokenizer, by whole keys.

    Args:
        tokenizer: a fast tokenizer of transformers.
        size: rows of the embedding. Tokens that the tokenizer lacks are written as unused ones.
        ends: further ids at which generation stops, besides the tokenizer's own end.

    Raises:
        ModelError: a tokenizer of a kind that llama.cpp does not have or cannot name, or larger than the embedding.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _error(tokenizer, "the tokenizer is not a fast one", type(tokenizer).__name__, "a tokenizer.json")
    spec = json.loads(backend.to_str())
    if spec["model"]["type"] != "BPE":
        raise _error(tokenizer, "llama.cpp does not have this kind of tokenizer", spec["model"]["type"],
                     "byte-level or SentencePiece BPE")
    texts, kinds = _tokens(tokenizer, spec, size)
    fields = _byte_level(tokenizer, spec) if _steps(spec)[-1:] in ([_BYTES], [_GPT2_BYTES]) else \
        _sentencepiece(tokenizer, spec, texts, kinds)
    fields |= {"tokens": texts, "token_type": kinds} | _special(tokenizer, ends)
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()} | template_fields(tokenizer)


def _tokens(tokenizer: Any, spec: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    by_id = {index: text for text, index in spec["model"]["vocab"].items()}
    added = {token["id"]: token for token in spec["added_tokens"]}
    count = max([*by_id, *added]) + 1
    if count > size:
        raise _error(tokenizer, "the tokenizer has more tokens than the model", f"{count:,} tokens",
                     f"at most {size:,}, the rows of the embedding",
                     "call model.resize_token_embeddings(len(tokenizer)) before training")
    texts, kinds = [f"[PAD{i}]" for i in range(size)], [_UNUSED] * size
    for index, text in by_id.items():
        texts[index], kinds[index] = text, _NORMAL
    for index, token in added.items():
        texts[index], kinds[index] = token["content"], _CONTROL if token["special"] else _USER_DEFINED
    trimmed = [token["content"] for token in added.values() if token["lstrip"] or token["single_word"]]
    if trimmed:
        logger.warning("llama.cpp does not know that these tokens swallow spaces or stand alone: %s",
                       ", ".join(trimmed[:5]))
    return texts, kinds


def _steps(spec: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The parts of the pre-tokenizer, in a form that does not depend on how it was written down."""
    whole = spec["pre_tokenizer"] or {"type": "Sequence", "pretokenizers": []}
    parts = whole["pretokenizers"] if whole["type"] == "Sequence" else [whole]
    steps: list[tuple[Any, ...]] = []
    for part in parts:
        kind = part["type"]
        if kind == "ByteLevel":
            steps.append(("bytes", part["add_prefix_space"], part["use_regex"]))
        elif kind == "Digits":
            steps.append(("digits", part["individual_digits"]))
        elif kind == "Split" and (part["behavior"], part["invert"]) in (("Isolated", False), ("Removed", True)):
            steps.append(("split", part["pattern"].get("Regex", part["pattern"])))
        else:
            steps.append((kind, json.dumps(part, sort_keys=True)))
    return steps


def _byte_level(tokenizer: Any, spec: dict[str, Any]) -> Fields:
    model, steps = spec["model"], tuple(_steps(spec))
    whole = bool(model.get("ignore_merges"))
    name = _SPLITS.get((steps, whole)) or _SPLITS.get((steps, None))
    if name is None:
        raise _error(tokenizer, "llama.cpp has no name for the way this tokenizer splits text",
                     f"{steps}, ignore_merges={whole}", "a rule of " + ", ".join(_SPLITS.values()))
    if spec["normalizer"] is not None and spec["normalizer"]["type"] != "NFC":
        raise _error(tokenizer, "llama.cpp does not change text before this kind of tokenizer",
                     spec["normalizer"]["type"], "no normalizer, or NFC")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {"model": "gpt2", "pre": name, "merges": merges}


def _sentencepiece(tokenizer: Any, spec: dict[str, Any], texts: list[str], kinds: list[int]) -> Fields:
    """Scores are made from the merges: whatever is joined first scores highest, as in SentencePiece's own files."""
    model = spec["model"]
    if not model.get("byte_fallback"):
        raise _error(tokenizer, "llama.cpp does not have this kind of tokenizer", str(_steps(spec))[:100],
                     "byte-level BPE, or SentencePiece BPE with byte_fallback")
    ranks: dict[str, int] = {}
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, len(ranks))
    scores = [0.0] * len(texts)
    for index, text in enumerate(texts):
        if kinds[index] == _NORMAL:
            scores[index] = -float(ranks.get(text, len(ranks) + index))
            if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                kinds[index], scores[index] = _BYTE, 0.0
        elif kinds[index] == _USER_DEFINED:
            texts[index] = text.replace("▁", " ")  # llama.cpp looks for them in the text as it came
    unknown = model.get("unk_token")
    if unknown in texts:
        kinds[texts.index(unknown)] = _UNKNOWN
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": _prefixed(tokenizer, spec)}


def _prefixed(tokenizer: Any, spec: dict[str, Any]) -> bool:
    """Whether a space is put before the text, which all such tokenizers turn into ▁."""
    prefix = False
    normalizer = spec["normalizer"] or {"type": "Sequence", "normalizers": []}
    for part in normalizer.get("normalizers", [normalizer]):
        if part["type"] == "Prepend" and part["prepend"] == "▁":
            prefix = True
        elif part["type"] != "Replace" or part["pattern"] != {"String": " "} or part["content"] != "▁":
            raise _error(tokenizer, "llama.cpp does not change text in this way", json.dumps(part),
                         "a normalizer that turns spaces into ▁")
    before = spec["pre_tokenizer"]
    if before is not None and before["type"] == "Metaspace":
        prefix = before.get("prepend_scheme", "always") != "never"
    elif before is not None and (before["type"], before.get("pattern")) != ("Split", {"String": " "}):
        raise _error(tokenizer, "llama.cpp does not split text in this way", json.dumps(before), "no pre-tokenizer")
    return prefix


def _special(tokenizer: Any, ends: list[int]) -> Fields:
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unknown": tokenizer.unk_token_id,
           "padding": tokenizer.pad_token_id}
    further = [index for index in dict.fromkeys(ends) if index != ids["eos"]]
    if ids["eos"] is None and further:
        ids["eos"] = further.pop(0)
    ids |= dict(zip(("eot", "eom"), further, strict=False))
    if further[2:]:
        logger.warning("A GGUF file names three tokens that end an answer; these are left out: %s",
                       ", ".join(str(tokenizer.convert_ids_to_tokens(index)) for index in further[2:]))
    found = tokenizer("a")["input_ids"]
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    fields: Fields = {f"{name}_token_id": index for name, index in ids.items() if index is not None}
    fields |= {"add_bos_token": found[:1] == [ids["bos"]] != inner[:1],
               "add_eos_token": found[-1:] == [ids["eos"]] != inner[-1:]}
    around = [ids["bos"]] * fields["add_bos_token"], [ids["eos"]] * fields["add_eos_token"]
    if found != [*around[0], *inner, *around[1]]:
        raise _error(tokenizer, "llama.cpp puts nothing but BOS and EOS around a text", str(found),
                     f"{inner}, with BOS before it or EOS behind it or not")
    return fields


def template_fields(tokenizer: Any) -> Fields:
    """The chat template, or all of them by name, as metadata."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        default = template.get("default") or next(iter(template.values()))
        named = {f"tokenizer.chat_template.{name}": text for name, text in template.items() if name != "default"}
        names = {"tokenizer.chat_templates": [name for name in template if name != "default"]} if named else {}
        return {"tokenizer.chat_template": default} | named | names
    return {"tokenizer.chat_template": template} if template else {}


def _error(tokenizer: Any, what: str, found: str, expected: str, fix: str = "") -> ModelError:
    return ModelError(what, where=f"tokenizer of {getattr(tokenizer, 'name_or_path', '') or 'the model'}", found=found,
                      expected=expected, fix=fix or "export to safetensors, which any tokenizer goes with: "
                      "save_pretrained_merged")
