"""Decoding on a GPU: an 8B model in NF4 with LoRA, transformers' `generate` beside recorded steps.

    python -m benchmarks.decode [--out benchmarks/results/decode-NAME.json] [--tiny]

Weights are random, of the shape of Llama 3.1 8B; adapters have rank 16 on all linear layers. Tokens/s of 128 answer
tokens after a prompt of 128, the median of five; the prompt's pass and recording the graphs are not in the time. Greedy
answers of both are compared (in bfloat16 they may part at a tie). Needs about 12 GB of GPU memory; --tiny tries the
script itself on any machine.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from gazelle.base.machine import machine_facts
from gazelle.generate.batcher import Batcher
from gazelle.generate.options import Sampling

SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0}
TINY = SHAPE | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "vocab_size": 512}
PROMPT, ANSWER, BATCHES = 128, 128, (1, 4, 16)


class NoText:
    eos_token_id = bos_token_id = None

    def decode(self, ids: list[int], **_: Any) -> str:
        return " " * len(ids)


def make(*, tiny: bool, on_gpu: bool) -> Any:
    """A random model whose linear layers bitsandbytes keeps in NF4, with LoRA away from zero."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    config = LlamaConfig(**(TINY if tiny else SHAPE), tie_word_embeddings=False, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("cuda" if on_gpu else "cpu"):
            AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
        torch.cuda.empty_cache()
        kept = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                  bnb_4bit_compute_dtype=dtype)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=kept, dtype=dtype,
                                                     device_map={"": "cuda" if on_gpu else "cpu"})
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    model.generation_config.eos_token_id = None
    return model.eval()


def wait() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def by_transformers(model: Any, rows: list[list[int]], repeats: int, answer: int) -> tuple[float, list[list[int]]]:
    ids = torch.tensor(rows, device=model.device)
    how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    seconds = []
    for repeat in range(repeats + 1):
        began = wait()
        model.generate(input_ids=ids, max_new_tokens=1, min_new_tokens=1, **how)
        first = wait() - began
        began = wait()
        out = model.generate(input_ids=ids, max_new_tokens=answer, min_new_tokens=answer, **how)
        if repeat:
            seconds.append(wait() - began - first)
    return len(rows) * (answer - 1) / statistics.median(seconds), out[:, len(rows[0]):].tolist()


def by_us(model: Any, rows: list[list[int]], repeats: int, answer: int, *,
          static: bool) -> tuple[float, list[list[int]]]:
    seconds = []
    with Batcher(model, NoText(), max_context=PROMPT + ANSWER + 1, max_running=len(rows), share_prefixes=False,
                 step_tokens=len(rows) * PROMPT, static=static,
                 cache_tokens=len(rows) * (PROMPT + ANSWER + 32)) as batcher:
        for repeat in range(repeats + 1):
            requests = [batcher.submit(row, Sampling(max_new_tokens=answer, ignore_eos=True)) for row in rows]
            batcher.step()
            began = wait()
            while batcher.busy:
                batcher.step()
            if repeat:
                seconds.append(wait() - began)
    return len(rows) * (answer - 1) / statistics.median(seconds), [request.tokens for request in requests]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path)
    options.add_argument("--tiny", action="store_true", help="a tiny model and few tokens, to try the script itself")
    chosen = options.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not chosen.tiny:
        raise SystemExit("there is no GPU here; --tiny tries the script itself")
    repeats, answer = (1, 8) if chosen.tiny else (5, ANSWER)
    model = make(tiny=chosen.tiny, on_gpu=on_gpu)
    figures = {}
    for batch in BATCHES:
        rows = torch.randint(3, 500, (batch, PROMPT), generator=torch.Generator().manual_seed(1)).tolist()
        theirs, want = by_transformers(model, rows, repeats, answer)
        eager, _ = by_us(model, rows, repeats, answer, static=False)
        ours, got = by_us(model, rows, repeats, answer, static=True)
        same = sum(a == b for one, two in zip(got, want, strict=True) for a, b in zip(one, two, strict=True))
        figures[str(batch)] = {"transformers": round(theirs, 1), "not recorded": round(eager, 1),
                               "recorded": round(ours, 1), "speedup": round(ours / theirs, 2),
                               "same_tokens": round(same / batch / answer, 3)}
        print(batch, figures[str(batch)], flush=True)
    result = {"machine": machine_facts(), "tiny": chosen.tiny, "prompt": PROMPT, "answer": answer,
              "tokens_per_second_by_batch": figures}
    print(json.dumps(result, indent=1))
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
