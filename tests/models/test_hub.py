"""Hub names, against a server on this machine that speaks as much of the hub's API as a download needs."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_thisIsNotARealTokenButMustNeverBePrinted"


def digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """One public model, `org/tiny`, and one that needs a token, `org/private`."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        parts = self.path.split("?")[0].strip("/").split("/")
        repository = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if repository == "org/private" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, b"{}", {"X-Error-Code": "GatedRepo"})
        if repository not in ("org/tiny", "org/private"):
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if parts[0] == "api":
            files = sorted(self.folder.iterdir())
            tree = [{"type": "file", "path": path.name, "size": path.stat().st_size, "oid": digest(path)}
                    for path in files]
            info = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": path.name} for path in files]}
            return self.answer(200, json.dumps(tree if "tree" in parts else info).encode())
        path = self.folder / parts[-1]
        if not path.is_file():
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        return self.answer(200, path.read_bytes(), {"ETag": f'"{digest(path)}"', "X-Repo-Commit": COMMIT})

    def answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, demo_tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, str]]:
    """The environment in which a program talks to the server."""
    Hub.folder, Hub.asked = tmp_path / "served", []
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=49152, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )).save_pretrained(Hub.folder)
    demo_tokenizer.save_pretrained(Hub.folder)
    (Hub.folder / "pytorch_model.bin").write_bytes(b"a pickle that nobody should ask for")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0",
                        "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": "src"}
    server.shutdown()
    server.server_close()


def load(environment: dict[str, str], name: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Load a model in a program of its own: the hub's address is read once, when its library is imported."""
    code = (
        "from gazelle import FastLanguageModel, UserError\n"
        "try:\n"
        f"    model, tokenizer = FastLanguageModel.from_pretrained({name!r}, load_in_4bit=False, **{options!r})\n"
        "    print('loaded', model.name_or_path, tokenizer.eos_token, round(model.lm_head.weight.sum().item(), 4))\n"
        "except UserError as error:\n"
        "    print('refused', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_a_hub_name_is_downloaded_and_then_found_without_asking(hub: dict[str, str]) -> None:
    done = load(hub, "org/tiny")
    assert done.stdout.startswith("loaded org/tiny <|im_end|>")
    assert any(path.endswith("model.safetensors") for path in Hub.asked)
    assert not any(path.endswith(".bin") for path in Hub.asked)
    Hub.asked.clear()
    again = load(hub | {"HF_HUB_OFFLINE": "1"}, "org/tiny")
    assert again.stdout == done.stdout
    assert Hub.asked == []


def test_a_gated_model_takes_a_token_and_never_prints_it(hub: dict[str, str], tmp_path: Path) -> None:
    refused = load(hub, "org/private")
    assert "refused org/private" in refused.stdout
    assert "hf auth login" in refused.stdout
    done = load(hub, "org/private", token=TOKEN)
    assert done.stdout.startswith("loaded org/private")
    assert TOKEN not in done.stdout + done.stderr
    files = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


def test_an_unknown_name_is_named(hub: dict[str, str]) -> None:
    done = load(hub, "org/tinny")
    assert "refused org/tinny: no model of this name on the hub" in done.stdout
    assert "to do:" in done.stdout
