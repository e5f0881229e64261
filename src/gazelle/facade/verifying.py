"""Verifying the exports of a model in memory."""

import tempfile
from pathlib import Path
from typing import Any

from gazelle.adapters.unwrap import unwrap
from gazelle.data.load import Loaded
from gazelle.data.templates import ensure_template
from gazelle.export.verify import Verification, verify
from gazelle.export.verify_probe import ask_model, make_probe
from gazelle.models.checkpoint import find_checkpoint
from gazelle.models.special_tokens import stop_ids

_WHOLE = ("16bit", "lora", "f32", "f16", "bf16", "float32", "float16")  # ways that round little or not at all


class Verifier:
    """A model in memory that has been asked, so that its exports can be."""

    def __init__(self, model: Any, tokenizer: Any, rows: Loaded | None, *, llama: str | None = None,
                 vllm: str | None = None) -> None:
        self._model = model
        self._tokenizer, self._llama, self._vllm = tokenizer, llama, vllm
        base = unwrap(model)
        if rows is not None and any(row.text is None for row in rows.conversations):
            ensure_template(tokenizer, base.config.model_type)
        self._probe = make_probe(tokenizer, rows.conversations if rows else [], rows.source if rows else "",
                                 stops=stop_ids(base.generation_config), longest=getattr(base, "max_seq_length", 512))
        self._reference = ask_model(model, self._probe)
        self._base = self._base_of(model) if hasattr(model, "peft_config") else None

    def check(self, folder: Path, ways: list[str], files: list[Path], consumer: str) -> list[Verification]:
        """Verify an export, each file of it if it is GGUF, and write down the results beside it."""
        if consumer == "gguf-lora":
            return [self._adapter(files[0])]
        paths = [path for path in files if path.suffix == ".gguf"] if consumer == "gguf" else [folder]
        found = []
        for path in paths:
            is_adapter = (path / "adapter_config.json").exists()
            way = path.stem.removeprefix("model-").lower() if consumer == "gguf" else ways[0]
            verified = verify(path, consumer, self._probe, self._reference, self._tokenizer, llama=self._llama,
                              vllm=self._vllm, base=self._base if is_adapter else None, whole=way in _WHOLE)
            verified.write()
            found.append(verified)
        return found

    def _adapter(self, adapter: Path) -> Verification:
        """An adapter as GGUF needs its base as GGUF, which goes away again."""
        from gazelle.export.gguf import export_gguf

        with tempfile.TemporaryDirectory() as scratch, self._model.disable_adapter():
            base, = export_gguf(self._model, self._tokenizer, scratch, "f16")
            verified = verify(base, "gguf", self._probe, self._reference, self._tokenizer, llama=self._llama,
                              lora=adapter, whole=True)
        verified.write()
        return verified

    @staticmethod
    def _base_of(model: Any) -> dict[str, Any]:
        """How plain PEFT is to load the base of an adapter, so that it is the one in memory."""
        base = unwrap(model)
        loading = getattr(model, "gazelle_loading", {})
        return loading | {"folder": str(find_checkpoint(base.config._name_or_path).folder),
                          "rows": base.get_input_embeddings().weight.shape[0]}
