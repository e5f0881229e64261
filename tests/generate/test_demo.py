"""The real demo model, prompts of mixed length, four adapters and none in one batch: transformers' answers, one by one.

The reference is transformers' `generate` on each prompt alone, with its own adapter active through PEFT.
"""

import random

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.generate.conftest import drive

from gazelle.generate.batcher import Batcher
from gazelle.generate.options import Sampling

WORDS = ["river", "engine", "violet", "twelve", "under", "marble", "letter", "sudden", "orange", "seven", "glass",
         "window", "bridge", "coal", "winter", "silver", "paper", "market", "stone", "honey"]
TARGETS = {"one": "all-linear", "two": ["q_proj", "v_proj"], "three": ["down_proj", "o_proj"], "four": ["gate_proj"]}


def adapters(model, folder):
    """Adapters whose B is far enough from zero to change answers."""
    for number, (name, targets) in enumerate(TARGETS.items()):
        torch.manual_seed(number)
        adapted = get_peft_model(model, LoraConfig(r=4 * (number + 1), lora_alpha=16, target_modules=targets))
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.02)
        adapted.save_pretrained(folder / name, save_embedding_layers=False)
        model = adapted.unload()
    return {name: folder / name for name in TARGETS}


def questions(tokenizer, number):
    draw = random.Random(0)
    found = []
    for index in range(number):
        text = f"Question {index}. " + " ".join(draw.choices(WORDS, k=draw.choice((1, 4, 16, 60)))) + "?"
        found.append(tokenizer.apply_chat_template([{"role": "user", "content": text}],
                                                   add_generation_prompt=True)["input_ids"])
    return found


def check(model, tokenizer, folder, number, tokens):
    folders = adapters(model, folder)
    rows = questions(tokenizer, number)
    asked = [(None, *TARGETS)[index % 5] for index in range(number)]
    with Batcher(model, tokenizer, adapters=folders, max_context=512, step_tokens=128) as batcher:
        requests = [batcher.submit(row, Sampling(max_new_tokens=tokens), name)
                    for row, name in zip(rows, asked, strict=True)]
        drive(batcher)
    reference = None
    for name, path in folders.items():
        if reference is None:
            reference = PeftModel.from_pretrained(model, path, adapter_name=name)
        else:
            reference.load_adapter(path, adapter_name=name)
    reference.eval()
    answers = set()
    for request, row, name in zip(requests, rows, asked, strict=True):
        ids = torch.tensor([row])
        how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": tokens, "do_sample": False}
        if name is None:
            with reference.disable_adapter():
                out = reference.generate(input_ids=ids, **how)
        else:
            reference.set_adapter(name)
            out = reference.generate(input_ids=ids, **how)
        assert request.tokens == out[0, len(row):].tolist(), f"prompt of {len(row)} tokens under {name}"
        answers.add(tuple(request.tokens))
    assert len(answers) > number // 4


def test_a_few(demo_model, demo_tokenizer, tmp_path):
    check(demo_model(), demo_tokenizer, tmp_path, 5, 4)


@pytest.mark.slow
def test_sixty_four(demo_model, demo_tokenizer, tmp_path):
    check(demo_model(), demo_tokenizer, tmp_path, 64, 16)
