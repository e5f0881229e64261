"""A tiny random model with two adapters in folders, and servers of it: in threads of this process, or by themselves."""

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.data.conftest import small_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from gazelle.data.templates import TEMPLATES, get_template
from gazelle.serve.keys import Keys
from gazelle.serve.loading import load_service
from gazelle.serve.server import Server, listen, make_server
from gazelle.serve.service import Service
from gazelle.serve.settings import Limits, Settings


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, and the adapters red and blue on it, whose answers differ."""
    root = tmp_path_factory.mktemp("serve")
    tokenizer = small_tokenizer(get_template("chatml"), TEMPLATES["chatml"], "<s>", "<|im_end|>")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))
    model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for name in ("red", "blue"):
        adapted = get_peft_model(LlamaForCausalLM.from_pretrained(root / "base"),
                                 LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.1)
        adapted.save_pretrained(root / name)
    tokenizer.save_pretrained(root / "red")
    return root


@dataclass
class Reference:
    """transformers' own answers, one at a time and greedy."""

    folder: Path
    tokenizer: Any
    models: dict[str, Any] = field(default_factory=dict)

    def model(self, name: str) -> Any:
        if name not in self.models:
            model = LlamaForCausalLM.from_pretrained(self.folder / "base")
            model = model if name == "base" else PeftModel.from_pretrained(model, self.folder / name)
            self.models[name] = model.eval()
        return self.models[name]

    def ids(self, messages: list[dict[str, str]]) -> list[int]:
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]

    def answer(self, name: str, ids: list[int], tokens: int) -> list[int]:
        """Ids of the answer, with the end token if it came."""
        given = torch.tensor([ids])
        answer = self.model(name).generate(given, attention_mask=torch.ones_like(given), do_sample=False,
                                           max_new_tokens=tokens)
        return answer[0, len(ids):].tolist()

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.fixture(scope="session")
def reference(folder: Path) -> Reference:
    from transformers import AutoTokenizer

    return Reference(folder, AutoTokenizer.from_pretrained(folder / "base"))


@dataclass
class Running:
    """A server of this process."""

    url: str
    service: Service
    server: Server

    def metrics(self) -> str:
        return httpx.get(f"{self.url}/metrics").text


@pytest.fixture(scope="session")
def start(folder: Path) -> Iterator[Callable[..., Running]]:
    """start(limit=…) serves base, red and blue until the tests end."""
    stop: list[tuple[Running, threading.Thread]] = []

    def run(keys: Keys | None = None, guard: Any = None, model: str = "base", host: str = "127.0.0.1",
            allowed_hosts: tuple[str, ...] = (), max_context: int | None = None, **limits: Any) -> Running:
        settings = Settings(host=host, port=0, allowed_hosts=allowed_hosts,
                            limits=Limits(**({"drain_seconds": 1} | limits)))
        adapters = {name: str(folder / name) for name in ("red", "blue") if name != model}
        service = load_service(str(folder / model), adapters, settings, guard=guard, max_context=max_context,
                               keys=keys.names if keys else ())
        bound = listen(settings)
        ready = threading.Event()
        server = make_server(service, keys, ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        assert ready.wait(60)
        running = Running(f"http://127.0.0.1:{bound.getsockname()[1]}", service, server)
        stop.append((running, thread))
        return running

    yield run
    for running, thread in stop:
        running.server.should_exit = True
        thread.join(10)
        running.service.close()


@pytest.fixture(scope="session")
def server(start: Callable[..., Running]) -> Running:
    """One with ordinary limits, for many tests."""
    return start()


class Process:
    """`gazelle serve` in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen([sys.executable, "-m", "gazelle", "serve", *arguments, "--port", "0"],
                                        stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self.url = ""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"(http://\S+)/v1", line):
                self.url = found[1]
                break
        assert self.url, "".join(self.lines)
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr or ()), daemon=True)
        self._reader.start()

    def end(self, seconds: float = 20) -> int:
        """Wait for its end; returns the exit code."""
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()
            self._reader.join(5)
            self.process.stderr.close()  # type: ignore[union-attr]
            self.process.wait()


def eventually(check: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until `check` holds."""
    until = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.02)
