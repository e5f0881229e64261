"""The model card of an export: what was trained on what, with which scores, under whose licence.

The hub reads the block of YAML at its head (https://huggingface.co/docs/hub/model-cards); it is made and checked by
huggingface_hub's own classes. The last line holds a digest of the rest, so that a card that somebody has edited is told
from one that may be written anew.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import yaml

from gazelle.adapters.unwrap import unwrap
from gazelle.base.files import write_text
from gazelle.base.sizes import megabytes
from gazelle.models.gguf_file import read_gguf

NAME = "README.md"
_MARK = re.compile(r"\n<!-- written by gazelle, ([0-9a-f]{64}) -->\n\Z")
_WHAT = {
    "peft": "A LoRA adapter, trained with [gazelle](https://pypi.org/project/gazelle).",
    "transformers": "A fine-tuned model, merged into one checkpoint.",
    "gguf": "A fine-tuned model as GGUF, for llama.cpp, Ollama, LM Studio and all that build on them.",
    "gguf-lora": "A LoRA adapter as GGUF, which llama.cpp and what builds on it put onto the base model.",
    "vllm": "A fine-tuned model in the format that vLLM serves.",
    "onnx": "A fine-tuned model as ONNX, with a cache of keys and values.",
}
_RELATION = {"peft": "adapter", "gguf-lora": "adapter", "transformers": "finetune"}


def write_card(folder: Path, model: Any, *, library: str, files: list[Path], run_folder: Path | None = None) -> None:
    """Write `README.md` into an export's folder, unless somebody's own is there."""
    path = folder / NAME
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
        if not (is_untouched(text) or is_empty_form(text)):
            return
    write_text(path, card_text(model, library=library, files=files, title=folder.name, run_folder=run_folder))


def drop_card(folder: Path) -> None:
    """Delete an earlier card of ours: PEFT would write into it, and it would pass for somebody's."""
    path = folder / NAME
    if path.exists() and is_untouched(path.read_text(encoding="utf-8", errors="replace")):
        path.unlink()


def is_untouched(text: str) -> bool:
    """Whether `card_text` wrote this, and nobody has changed it."""
    found = _MARK.search(text)
    return found is not None and found[1] == _digest(text[:found.start()])


def is_empty_form(text: str) -> bool:
    """Whether this is what PEFT puts beside an adapter: a form in which nothing is filled in."""
    return "library_name: peft" in text and "# Model Card for Model ID" in text and "[More Information Needed]" in text


def card_text(model: Any, *, library: str, files: list[Path], title: str, run_folder: Path | None = None,
              repository: str | None = None, token: str | None = None) -> str:
    """The card.

    Args:
        model: the model in memory; what `record_run` noted of its training is on it.
        library: what reads the export, as the hub calls it: "peft", "transformers", "gguf", "vllm" or "onnx".
        files: those whose sizes are listed.
        title: its heading.
        run_folder: the folder of the run, whose scores.json is looked at.
        repository: name on the hub, for the lines that show how to use it.
        token: for asking the hub about the licence of a private base.
    """
    from huggingface_hub import ModelCard, ModelCardData

    base = unwrap(model)
    name = str(getattr(base.config, "_name_or_path", "") or "")
    if (original := _original(name)) is not None:
        name = original
    on_hub = bool(name) and not Path(name).exists() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None
    licence = _licence(name, on_hub, token)
    kind = "gguf-lora" if library == "gguf" and any(map(_is_gguf_adapter, files)) else library
    metadata: dict[str, Any] = {
        "base_model": name if on_hub else None, "library_name": library, "pipeline_tag": "text-generation",
        "tags": ["gazelle", base.config.model_type, *(["lora"] if kind in ("peft", "gguf-lora") else []),
                 *(["gguf"] if library == "gguf" else [])]} | licence
    if on_hub:
        metadata["base_model_relation"] = _RELATION.get(kind, "quantized")
    data = ModelCardData(**metadata)
    run = getattr(model, "gazelle_run", None) or {}
    shown = name if on_hub else Path(name).name or type(base).__name__
    use, language = _use(kind, repository or title, files)
    card = ModelCard.from_template(
        data, template_path=str(Path(__file__).with_name("card.md.jinja")), title=title, what=_WHAT[kind],
        base_shown=f"[{shown}](https://huggingface.co/{shown})" if on_hub else shown,
        licence_shown=licence.get("license_name") or licence.get("license") or "", facts=run.get("facts", []),
        files=[(path.name, megabytes(path.stat().st_size)) for path in files if path.suffix in (
            ".gguf", ".safetensors", ".onnx", ".data")],
        scores=_scores(run_folder), data_lines="\n".join(run.get("data_report", [])),
        settings=run.get("settings", []), use=use, language=language)
    text = str(card).rstrip("\n") + "\n"
    return f"{text}\n<!-- written by gazelle, {_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _original(name: str) -> str | None:
    """The hub name that a local copy states, if it states one."""
    config = Path(name) / "config.json"
    if not name or not config.is_file():
        return None
    try:
        stated = json.loads(config.read_text(encoding="utf-8")).get("_name_or_path")
    except (ValueError, AttributeError):
        return None
    return stated if isinstance(stated, str) and stated.count("/") == 1 and not Path(stated).exists() else None


def _licence(name: str, on_hub: bool, token: str | None) -> dict[str, Any]:
    """`license`, and its name and link where it is "other", as the base model's own card states them."""
    from huggingface_hub import ModelCard, constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import httpx

    if not name:
        return {}
    path = Path(name)
    if path.suffix == ".gguf" and path.is_file():
        stated = read_gguf(path).metadata.get("general.license")
        return {"license": stated} if isinstance(stated, str) else {}
    try:
        if on_hub:
            cached = try_to_load_from_cache(name, NAME)
            if not isinstance(cached, str) and constants.is_offline_mode():
                return {}
            card = ModelCard.load(cached if isinstance(cached, str) else name, token=token)
        elif (path / NAME).is_file():
            card = ModelCard.load(path / NAME)
        else:
            return {}
    except (httpx.HTTPError, OSError, ValueError, HFValidationError, yaml.YAMLError):
        return {}  # no card, or none to be had: then nothing is said of the licence
    return {key: value for key in ("license", "license_name", "license_link")
            if isinstance(value := card.data.get(key), str)}


def _scores(folder: Path | None) -> list[tuple[str, str, str]]:
    """(what, before, after) from a run's scores.json: right answers of those asked."""
    path = folder / "scores.json" if folder is not None else None
    if path is None or not path.is_file():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    groups = {"paraphrases": content.get("paraphrases", {})} | {
        category: {when: content["by_category"][when][category] for when in ("before", "after")}
        for category in content.get("by_category", {}).get("after", {})}
    return [(name, *(f"{counts[when][0]} of {counts[when][1]}" for when in ("before", "after")))
            for name, counts in groups.items() if {"before", "after"} <= counts.keys()]


def _is_gguf_adapter(file: Path) -> bool:
    return file.suffix == ".gguf" and file.is_file() and read_gguf(file).metadata.get("general.type") == "adapter"


def _use(library: str, name: str, files: list[Path]) -> tuple[str, str]:
    """Lines that load it, and their language."""
    if library == "gguf-lora":
        return f"llama-cli -m base-model.gguf --lora {files[0].name} -cnv", "bash"
    if library == "gguf" and any(path.name == "Modelfile" for path in files):
        model = name.rpartition("/")[2].lower()
        return f"ollama create {model} -f Modelfile\nollama run {model}", "bash"
    if library == "gguf":
        one = next((path.name for path in files if path.suffix == ".gguf"), "model.gguf")
        return f"llama-cli -m {one} -cnv", "bash"
    if library == "vllm":
        return f"vllm serve {name}", "bash"
    if library == "onnx":
        return f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{name}/model.onnx")', "python"
    kind = "AutoPeftModelForCausalLM" if library == "peft" else "AutoModelForCausalLM"
    package = "peft" if library == "peft" else "transformers"
    imports = f"from {package} import {kind}\nfrom transformers import AutoTokenizer" if library == "peft" else \
        f"from {package} import {kind}, AutoTokenizer"
    return (f'{imports}\n\nmodel = {kind}.from_pretrained("{name}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")'), "python"
