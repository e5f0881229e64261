"""transformers as a consumer: a folder of safetensors, or an adapter on its base through PEFT. No engine, no gazelle.

The model in memory is asked by the same functions.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch


def answer(request: dict[str, Any]) -> tuple[dict[str, Any], "np.ndarray[Any, Any] | None"]:
    """Answer a request, as the package describes it, in plain transformers."""
    import transformers
    from transformers import AutoTokenizer

    torch.set_num_threads(request["threads"])
    folder = Path(request["path"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = _load(folder, request)
    given, logits = ask(model, request)
    generation = model.generation_config.eos_token_id
    given |= {"consumer": f"transformers {transformers.__version__} ({str(model.dtype).removeprefix('torch.')})",
              "texts": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in request["texts"]],
              "chats": [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
                        if tokenizer.chat_template else None for chat in request["chats"]],
              "ends": generation if isinstance(generation, list) else [] if generation is None else [generation]}
    return given, logits


def _load(folder: Path, request: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    on_gpu = torch.cuda.is_available()
    options: dict[str, Any] = {"device_map": "cuda:0" if on_gpu else "cpu",
                               "dtype": "auto" if on_gpu else torch.float32}
    if not (folder / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    from peft import PeftModel

    kept = request.get("base", {})
    if kept.get("load_in_4bit"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kept.get("quant_method", "nf4"), bnb_4bit_use_double_quant=True)
    elif kept.get("load_in_8bit"):
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    base = AutoModelForCausalLM.from_pretrained(kept["folder"], **options)
    if (rows := kept.get("rows", 0)) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(base, folder).eval()


def ask(model: Any, request: dict[str, Any]) -> tuple[dict[str, Any], "np.ndarray[Any, Any] | None"]:
    """`answers`, `logprobs`, `likeliest` and the kept logits of a model object."""
    logprobs, likeliest, kept = [], [], []
    room = request["kept"]
    with torch.no_grad():
        for row in request["rows"]:
            ids = torch.tensor([row["ids"]], device=model.device)
            at = torch.tensor(row["at"], device=model.device, dtype=torch.long)
            logits = model(input_ids=ids, use_cache=False).logits[0, at].float()
            following = ids[0, at + 1]
            logprobs.append(logits.double().log_softmax(-1)[torch.arange(len(at)), following].tolist())
            likeliest.append(logits.argmax(-1).tolist())
            kept.append(logits[:room].cpu().numpy())
            room -= len(kept[-1])
        answers = [_greedy(model, prompt, request) for prompt in request["prompts"]]
    return {"answers": answers, "logprobs": logprobs, "likeliest": likeliest}, np.concatenate(kept) if kept else None


def _greedy(model: Any, prompt: list[int], request: dict[str, Any]) -> list[int]:
    """One prompt at a time, without padding, which would change the last bits and with them near draws."""
    out: list[int] = []
    new, cache = torch.tensor([prompt], device=model.device), None
    while len(out) < request["tokens"] and not (out and out[-1] in request["stops"]):
        result = model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = result.past_key_values
        out.append(int(result.logits[0, -1].float().argmax()))
        new = torch.tensor([out[-1:]], device=model.device)
    return out
