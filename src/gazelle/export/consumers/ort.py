"""onnxruntime as a consumer: `model.onnx` in a folder, with the tokenizer beside it, answering through its cache."""

from pathlib import Path
from typing import Any

import numpy as np

from gazelle.export.consumers.rows import judged


def answer(request: dict[str, Any]) -> tuple[dict[str, Any], "np.ndarray[Any, Any] | None"]:
    """Answer a request, as the package describes it."""
    import onnxruntime
    from transformers import AutoTokenizer, GenerationConfig

    folder = Path(request["path"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = request["threads"]
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    logprobs, likeliest, kept = [], [], []
    room = request["kept"]
    for row in request["rows"]:
        logits = _feed(session, row["ids"], {})[0][row["at"]].astype(np.float32)
        kept.append(logits[:room])
        room -= len(kept[-1])
        said, chosen = judged(row, logits)
        logprobs.append(said)
        likeliest.append(chosen)
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    given = {"consumer": f"onnxruntime {onnxruntime.__version__}",
             "texts": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in request["texts"]],
             "chats": [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
                       for chat in request["chats"]],
             "ends": ends if isinstance(ends, list) else [] if ends is None else [ends],
             "answers": [_greedy(session, prompt, request) for prompt in request["prompts"]],
             "logprobs": logprobs, "likeliest": likeliest}
    return given, np.concatenate(kept) if kept else None


def _feed(session: Any, ids: list[int], cache: dict[str, Any]) -> tuple["np.ndarray[Any, Any]", dict[str, Any]]:
    """Logits [T, V] of a row that goes on behind `cache`, and the cache behind it."""
    past = next((value.shape[2] for value in cache.values()), 0)
    feeds = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, past + len(ids)), np.int64),
             "position_ids": np.arange(past, past + len(ids), dtype=np.int64)[None]}
    for entry in session.get_inputs():
        if entry.name.startswith("past_key_values."):
            heads, size = (dimension for dimension in entry.shape if isinstance(dimension, int))
            empty = np.zeros((1, heads, 0, size), np.float16 if "float16" in entry.type else np.float32)
            feeds[entry.name] = cache.get(entry.name, empty)
    names = [entry.name for entry in session.get_outputs()]
    found = dict(zip(names, session.run(names, feeds), strict=True))
    return found["logits"][0], {name.replace("present.", "past_key_values."): value for name, value in found.items()
                                if name.startswith("present.")}


def _greedy(session: Any, prompt: list[int], request: dict[str, Any]) -> list[int]:
    out: list[int] = []
    new, cache = prompt, dict[str, Any]()
    while len(out) < request["tokens"] and not (out and out[-1] in request["stops"]):
        logits, cache = _feed(session, new, cache)
        out.append(int(logits[-1].argmax()))
        new = out[-1:]
    return out
