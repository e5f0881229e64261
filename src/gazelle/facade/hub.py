"""`model.push_to_hub` and its kin: export to a folder that goes away again, and upload that."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gazelle.base.errors import OptionError, nearest
from gazelle.base.log import logger
from gazelle.facade.saving import check_method, loaded_tokenizer, save_checkpoint
from gazelle.models.hub import check_repository, push_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_COMMIT = ("commit_message", "commit_description", "revision", "create_pr")
_BITS = {2: "q2_k", 3: "q3_k_m", 4: "q4_k_m", 5: "q5_k_m", 6: "q6_k", 8: "q8_0", 16: "f16", 32: "f32"}


def push_to_hub(self: "PreTrainedModel", repo_id: str, *, tokenizer: "PreTrainedTokenizerBase | None" = None,
                private: bool | None = None, token: str | None = None, max_shard_size: str | int = "5GB",
                **commit: Any) -> Any:
    """Upload the adapter, or a model without one in the type that it has, with a card written from the run.

    Args:
        repo_id: such as "user/name"; made if need be.
        tokenizer: uploaded beside it.
        private: for a new repository.
        token: else that of `hf auth login`.
        max_shard_size: largest weight file.
        **commit: `commit_message`, `commit_description`, `revision`, `create_pr`.

    Returns:
        huggingface_hub's `CommitInfo`.

    Raises:
        HubError: the hub refuses or cannot be reached; then nothing is committed.
    """
    if hasattr(self, "peft_config"):
        return _push(self, tokenizer, repo_id, "lora", private, token, max_shard_size, commit)
    return _push(self, tokenizer, repo_id, "merged_16bit", private, token, max_shard_size, commit, dtype=self.dtype)


def push_to_hub_merged(self: "PreTrainedModel", repo_id: str, tokenizer: "PreTrainedTokenizerBase | None" = None,
                       save_method: str = "merged_16bit", *, private: bool | None = None, token: str | None = None,
                       max_shard_size: str | int = "5GB", **options: Any) -> Any:
    """Upload what `save_pretrained_merged` writes, with a card. Arguments as there and in `push_to_hub`."""
    commit = {name: options.pop(name) for name in _COMMIT if name in options}
    return _push(self, tokenizer, repo_id, save_method, private, token, max_shard_size, commit, **options)


def _push(model: Any, tokenizer: Any, repo_id: str, method: str, private: bool | None, token: str | None,
          max_shard_size: str | int, commit: dict[str, Any], **options: Any) -> Any:
    _check_commit(commit)
    check_method(method, options | {"max_shard_size": max_shard_size})
    repository = check_repository(repo_id, token=token, private=private, adapter=method == "lora",
                                  revision=commit.get("revision"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_checkpoint(model, tokenizer, folder, method, max_shard_size=max_shard_size, **options)
        return push_folder(folder, repository, model, token=token, **commit)


def push_to_hub_gguf(self: "PreTrainedModel", repo_id: str, tokenizer: "PreTrainedTokenizerBase | None" = None,
                     quantization_method: str | list[str] | None = None, *, quantization_bits: int | None = None,
                     group_size: int | None = None, act_order: bool | None = None, private: bool | None = None,
                     token: str | None = None, **commit: Any) -> Any:
    """Upload GGUF files, with a card.

    Args:
        repo_id: such as "user/name"; made if need be. Other files in it stay.
        tokenizer: written into the files. Left out: the one that the model was loaded with.
        quantization_method: as in `save_pretrained_gguf`; "q8_0" if nothing is said.
        quantization_bits: instead of a method: the kind of so many bits is taken.
        group_size, act_order: GPTQ's; GGUF's kinds have groups of their own, and the log says which.
        private, token, **commit: as in `push_to_hub`.
    """
    from gazelle.export.gguf import export_gguf

    _check_commit(commit)
    methods = _methods(quantization_method, quantization_bits, group_size, act_order)
    if tokenizer is None:
        tokenizer = loaded_tokenizer(self)
    repository = check_repository(repo_id, token=token, private=private)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        export_gguf(self, tokenizer, folder, methods)
        return push_folder(folder, repository, self, token=token, library="gguf", **commit)


def _check_commit(commit: dict[str, Any]) -> None:
    if unknown := [name for name in commit if name not in _COMMIT]:
        raise OptionError("unknown option for a push", where="push_to_hub", found=unknown[0],
                          expected=", ".join(_COMMIT), fix=nearest(unknown[0], _COMMIT))


def _methods(method: str | list[str] | None, bits: int | None, group_size: int | None, act_order: bool | None
             ) -> str | list[str]:
    """The method asked for, or the kind nearest to what GPTQ's options ask for."""
    from gazelle.export.gguf_recipe import find_recipes

    if method is not None or bits is None:
        if method is not None and bits is not None:
            raise OptionError("both a method and a number of bits", where="quantization_bits",
                              found=f"{bits}, {method}", expected="one of the two", fix="leave out quantization_bits")
        find_recipes(method or "q8_0")
        return method or "q8_0"
    if bits not in _BITS:
        near = min(_BITS, key=lambda known: abs(known - bits))
        raise OptionError("no kind of GGUF has so many bits", where="quantization_bits", found=bits,
                          expected=", ".join(map(str, _BITS)), fix=f"use quantization_bits={near}")
    kind = _BITS[bits]
    groups = "values one by one" if bits >= 16 else "groups of 32" if kind == "q8_0" else \
        "groups of 16 or 32 within blocks of 256"
    ignored = [name for name, value in (("group_size", group_size), ("act_order", act_order)) if value is not None]
    logger.info("quantization_bits=%d is %s, the nearest of GGUF's kinds: %s%s", bits, kind, groups,
                f"; GGUF has no {' and no '.join(ignored)}, so without effect" if ignored else "")
    return kind
