"""vLLM as a consumer, run by the Python that has it: `python vllm_script.py REQUEST ANSWER`. Needs nothing of gazelle.

vLLM gives no logits, but the logarithms of probability of a prompt's tokens and of the likeliest token at each place.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes as the largest


def main(request_file: str, answer_file: str) -> None:
    """Answer the request in one file in another."""
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    Path(answer_file).write_text(json.dumps(_answer(request)), encoding="utf-8")


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import vllm
    from vllm.lora.request import LoRARequest

    folder = Path(request["path"])
    adapter = (folder / "adapter_config.json").exists()
    longest = max([len(row["ids"]) + 1 for row in request["rows"]]
                  + [len(prompt) + request["tokens"] for prompt in request["prompts"]])
    options: dict[str, Any] = {"enforce_eager": True, "max_model_len": longest, "gpu_memory_utilization": 0.5}
    if adapter:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        rank = max([settings["r"], *(settings.get("rank_pattern") or {}).values()])
        options |= {"enable_lora": True, "max_lora_rank": next(most for most in _RANKS if most >= rank),
                    "tokenizer": str(folder)}
    model = vllm.LLM(model=request["base"]["folder"] if adapter else str(folder), **options)
    lora = LoRARequest("adapter", 1, str(folder)) if adapter else None
    tokenizer = model.get_tokenizer()
    greedy = vllm.SamplingParams(temperature=0, max_tokens=request["tokens"], stop_token_ids=request["stops"],
                                 detokenize=False)
    answers = model.generate([{"prompt_token_ids": prompt} for prompt in request["prompts"]], greedy,
                             lora_request=lora, use_tqdm=False)
    look = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    # One row at a time: on a CPU, vLLM 0.32 fails at the log-probabilities of several prompts under an adapter.
    looked = [model.generate([{"prompt_token_ids": row["ids"]}], look, lora_request=lora, use_tqdm=False)[0]
              for row in request["rows"]]
    logprobs, likeliest = [], []
    for row, result in zip(request["rows"], looked, strict=True):
        places = [(row["ids"][at + 1], result.prompt_logprobs[at + 1]) for at in row["at"]]
        logprobs.append([found[token].logprob for token, found in places])
        likeliest.append([max(found, key=lambda token: found[token].logprob) for _, found in places])
    return {
        "consumer": f"vLLM {vllm.__version__}", "ends": None,
        "texts": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in request["texts"]],
        "chats": [_rendered(tokenizer, chat) for chat in request["chats"]],
        "answers": [list(result.outputs[0].token_ids) for result in answers],
        "logprobs": logprobs, "likeliest": likeliest,
    }


def _rendered(tokenizer: Any, chat: list[dict[str, Any]]) -> list[int]:
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


if __name__ == "__main__":
    main(*sys.argv[1:])
