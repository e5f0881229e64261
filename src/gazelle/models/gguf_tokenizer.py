"""Builds a Hugging Face tokenizer from the vocabulary inside a GGUF file.

transformers' own reader takes EOS from the BOS field for Llama-type files and gives every one of them GPT-2's
splitting rule, so digits of a SmolLM are tokenised unlike in its training. Here the file's own fields decide:
ids by `tokenizer.ggml.*_token_id`, splitting by `tokenizer.ggml.pre`, as in llama.cpp's `src/llama-vocab.cpp`.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from gazelle.base.errors import ModelError
from gazelle.models.gguf_file import GgufFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types

LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

# tokenizer.ggml.pre -> (splitting rule, one token per digit)
_SPLITS: dict[str, tuple[str | None, bool]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt"), (None, False)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), (None, True)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"), (LLAMA3_SPLIT, False)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (QWEN2_SPLIT, False)),
}
_IGNORE_MERGES = ("llama-bpe", "llama3", "llama-v3")


def gguf_tokenizer(file: GgufFile) -> "PreTrainedTokenizerFast":
    """The tokenizer of `file`, with its chat template. Its pad token is set only if it differs from EOS.

    Raises:
        ModelError: no vocabulary in the file, or one of a kind that is not known here.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = file.get("tokenizer.ggml.tokens", list, [])
    kind = file.get("tokenizer.ggml.model", str)
    if kind not in ("gpt2", "llama") or not tokens:
        raise ModelError("no usable tokenizer in the GGUF file", where=f"{file.path}, tokenizer.ggml.model",
                         found=kind, expected='"gpt2" (byte-level BPE) or "llama" (SentencePiece BPE)',
                         fix="use the model's safetensors checkpoint")
    backend = _byte_level(file, tokens) if kind == "gpt2" else _sentencepiece(file, tokens)
    types = file.get("tokenizer.ggml.token_type", list, [])
    added = [AddedToken(token, normalized=False, special=type_ == _CONTROL)
             for token, type_ in zip(tokens, types, strict=False) if type_ in (_CONTROL, _USER_DEFINED)]
    backend.add_tokens(added)

    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {name: _token(file, tokens, field) for name, field in names.items()}
    if special["pad_token"] == special["eos_token"]:
        special["pad_token"] = None
    if _adds_bos(file, kind) and special["bos_token"]:
        _prepend(backend, special["bos_token"], tokens.index(special["bos_token"]))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False,
        model_max_length=file.get(f"{file.architecture}.context_length", int, int(1e30)),
        **{name: token for name, token in special.items() if token is not None})
    tokenizer.chat_template = file.get("tokenizer.chat_template", str)
    return tokenizer


def end_of_turn_ids(file: GgufFile) -> list[int]:
    """All ids at which generation stops, the main EOS first."""
    fields = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    return list(dict.fromkeys(file.get(field, int) for field in fields if field in file.metadata))


def _token(file: GgufFile, tokens: list[str], field: str) -> str | None:
    key = f"tokenizer.ggml.{field}_token_id"
    index = file.get(key, int)
    if index is None:
        return None
    if not 0 <= index < len(tokens):
        raise ModelError("a special token is outside the vocabulary", where=f"{file.path}, {key}", found=index,
                         expected=f"0 to {len(tokens) - 1}", fix="download or export the file again")
    return tokens[index]


def _adds_bos(file: GgufFile, kind: str) -> bool:
    default = kind == "llama" or file.get("tokenizer.ggml.pre", str) in _IGNORE_MERGES
    return file.get("tokenizer.ggml.add_bos_token", bool, default)


def _prepend(backend: "Tokenizer", bos: str, index: int) -> None:
    from tokenizers import processors

    template = processors.TemplateProcessing(single=[bos, "$A"], pair=[bos, "$A", bos, "$B"],
                                             special_tokens=[(bos, index)])
    earlier = backend.post_processor
    backend.post_processor = template if earlier is None else processors.Sequence([earlier, template])


def _byte_level(file: GgufFile, tokens: list[str]) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    pre = file.get("tokenizer.ggml.pre", str, "gpt-2")
    if pre not in _SPLITS:
        raise ModelError("the GGUF file splits text by a rule not known here", where=f"{file.path}, tokenizer.ggml.pre",
                         found=pre, expected="one of " + ", ".join(sorted(_SPLITS)),
                         fix="use the model's safetensors checkpoint")
    rule, single_digits = _SPLITS[pre]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [merge.partition(" ")[::2] for merge in file.get("tokenizer.ggml.merges", list, [])]
    for left, right in merges:
        if not {left, right, left + right} <= vocabulary.keys():
            raise ModelError("a merge rule uses tokens that are not there", found=f"{left} {right}",
                             where=f"{file.path}, tokenizer.ggml.merges", expected="tokens of the vocabulary",
                             fix="download or export the file again")
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _IGNORE_MERGES))
    steps: list[Any] = []
    if rule is not None:
        steps.append(pre_tokenizers.Split(Regex(rule), behavior="isolated"))
    if single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if rule is QWEN2_SPLIT:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _sentencepiece(file: GgufFile, tokens: list[str]) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers

    prefix = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    scores = file.get("tokenizer.ggml.scores", list, [0.0] * len(tokens))
    unknown = _token(file, tokens, "unknown")
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=_merges(tokens, scores),
                                   unk_token=unknown, fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    return backend


def _merges(tokens: list[str], scores: Iterable[float]) -> list[tuple[str, str]]:
    """SentencePiece joins whichever neighbours give the best-scored token, so every split of it is a merge."""
    known = {token: i for i, token in enumerate(tokens)}
    ranked = sorted(zip(tokens, scores, strict=False), key=lambda pair: -pair[1])
    merges = []
    for token, _ in ranked:
        splits = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in known and token[i:] in known]
        merges += sorted(splits, key=lambda split: (known[split[0]], known[split[1]]))
    return merges
