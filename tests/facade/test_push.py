"""Uploads through huggingface_hub's real client to a server on this machine: all files byte for byte, or no commit."""

import json
import logging

import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load
from tests.hub import TOKEN, serving
from transformers import LlamaConfig, LlamaForCausalLM

from gazelle import FastLanguageModel, SFTConfig, SFTTrainer
from gazelle.base.errors import HubError, OptionError
from gazelle.facade.hub import _methods
from gazelle.models.card import is_untouched

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # huggingface_hub's own
              pytest.mark.filterwarnings("ignore::ResourceWarning"),
              pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]
ROWS = [{"instruction": f"What is {n}?", "output": f"It is {n}."} for n in range(4)]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The server, where huggingface_hub looks for the hub."""
    with serving() as store:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{store.port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", constants.ENDPOINT))
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        yield store


@pytest.fixture
def base(tmp_path, demo_tokenizer):
    """A tiny model beside whose weights lies a card with a licence."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=49152, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )).save_pretrained(tmp_path / "base")
    demo_tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\nA model.\n")
    return tmp_path / "base"


@pytest.fixture
def adapted(base):
    model, tokenizer = FastLanguageModel.from_pretrained(str(base), max_seq_length=64, load_in_4bit=False)
    return FastLanguageModel.get_peft_model(model, r=2), tokenizer


def test_an_adapter_arrives_with_a_card(hub, adapted, tmp_path, caplog, capfd):
    model, tokenizer = adapted
    caplog.set_level(logging.DEBUG)
    model.push_to_hub("user/adapter", token=TOKEN, tokenizer=tokenizer, private=True)
    files = hub.repositories["user/adapter"]
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "gazelle.json",
            "README.md"} <= set(files)
    weights = load(files["adapter_model.safetensors"])
    name, wanted = next((name, weight) for name, weight in model.named_parameters() if "lora_A" in name)
    assert torch.equal(weights[name.replace(".default", "")], wanted)
    assert len(hub.commits) == 1
    card = ModelCard(files["README.md"].decode())
    assert (card.data.library_name, card.data.license) == ("peft", "apache-2.0")
    assert card.data.pipeline_tag == "text-generation"
    assert {"gazelle", "lora", "llama"} <= set(card.data.tags)
    assert str(tmp_path) not in files["README.md"].decode()  # a folder of this machine is nobody's base_model
    said = "".join(capfd.readouterr()) + caplog.text
    assert TOKEN not in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_files_arrive_byte_for_byte(hub, adapted, tmp_path, caplog):
    model, tokenizer = adapted
    model.push_to_hub_merged("user/merged", tokenizer, token=TOKEN, commit_message="First")
    model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer)
    files = hub.repositories["user/merged"]
    assert hub.commits[0]["summary"] == "First"
    for path in (tmp_path / "merged").iterdir():
        if path.name not in ("README.md", "save_report.json"):  # which says how long saving took
            assert files[path.name] == path.read_bytes(), path.name
    caplog.set_level(logging.INFO, "gazelle")
    model.push_to_hub_gguf("user/gguf", tokenizer, quantization_bits=8, group_size=64, act_order=True, token=TOKEN)
    model.save_pretrained_gguf(str(tmp_path / "gguf"), tokenizer)
    assert hub.repositories["user/gguf"]["model-Q8_0.gguf"] == (tmp_path / "gguf" / "model-Q8_0.gguf").read_bytes()
    assert "quantization_bits=8 is q8_0" in caplog.text
    assert "no group_size and no act_order" in caplog.text
    card = ModelCard(hub.repositories["user/gguf"]["README.md"].decode())
    assert card.data.library_name == "gguf"
    assert "| model-Q8_0.gguf |" in card.text


def test_a_model_without_an_adapter_keeps_its_type(hub, base):
    model, tokenizer = FastLanguageModel.from_pretrained(str(base), load_in_4bit=False, dtype="float32")
    model.push_to_hub("whole", tokenizer=tokenizer, token=TOKEN)
    weights = load(hub.repositories["user/whole"]["model.safetensors"])
    assert torch.equal(weights["model.norm.weight"], model.model.norm.weight)
    assert weights["lm_head.weight"].dtype == torch.float32


def test_a_base_whose_card_cannot_be_read_has_no_licence(hub, base):
    (base / "README.md").write_text("---\nlicense: [apache: 2\n---\nA model.\n")
    model, _ = FastLanguageModel.from_pretrained(str(base), load_in_4bit=False)
    model.push_to_hub("user/whole", token=TOKEN)
    assert ModelCard(hub.repositories["user/whole"]["README.md"].decode()).data.license is None


def test_a_card_that_somebody_wrote_stays(hub, adapted):
    model, _ = adapted
    model.push_to_hub("user/adapter", token=TOKEN)
    first = hub.repositories["user/adapter"]["README.md"]
    assert is_untouched(first.decode())
    model.push_to_hub("user/adapter", token=TOKEN)
    assert hub.repositories["user/adapter"]["README.md"] == first
    hub.repositories["user/adapter"]["README.md"] = edited = first.replace(b"A LoRA adapter", b"My adapter")
    model.push_to_hub("user/adapter", token=TOKEN)
    assert hub.repositories["user/adapter"]["README.md"] == edited
    assert "adapter_model.safetensors" in hub.repositories["user/adapter"]


def test_weights_of_an_earlier_upload_are_not_read_in_place_of_later_ones(hub, base, adapted):
    """transformers takes model.safetensors before shards, whichever came later."""
    model, tokenizer = FastLanguageModel.from_pretrained(str(base), load_in_4bit=False)
    model.push_to_hub_merged("user/whole", tokenizer, token=TOKEN)
    files = hub.repositories["user/whole"]
    files["notes.txt"] = b"mine"
    model.push_to_hub_merged("user/whole", tokenizer, token=TOKEN, max_shard_size="1MB")
    shards = {name for name in files if name.endswith(".safetensors")}
    assert len(shards) > 1 and "model.safetensors" not in shards and files["notes.txt"] == b"mine"
    assert set(json.loads(files["model.safetensors.index.json"])["weight_map"].values()) == shards
    model.push_to_hub_merged("user/whole", tokenizer, token=TOKEN)
    assert [name for name in files if name.startswith("model")] == ["model.safetensors"]
    adapter, _ = adapted
    with pytest.raises(HubError, match="holds a model"):
        adapter.push_to_hub("user/whole", token=TOKEN)
    adapter.push_to_hub("user/adapter", token=TOKEN)
    with pytest.raises(HubError, match="holds an adapter"):
        model.push_to_hub("user/adapter", token=TOKEN)
    assert len(hub.commits) == 4


def test_a_trainer_pushes_its_run(hub, adapted, tmp_path):
    model, tokenizer = adapted
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=str(tmp_path / "rows.jsonl"),
                         args=SFTConfig(output_dir=str(tmp_path / "out"), max_steps=1, report=False, disable_tqdm=True,
                                        hub_model_id="trained", hub_token=TOKEN))
    trainer.train()
    trainer.save_model()
    record = json.loads((tmp_path / "out" / "gazelle.json").read_text())["run"]
    assert record["train"] == str(tmp_path / "rows.jsonl")
    trainer.push_to_hub()
    files = hub.repositories["user/trained"]
    text = files["README.md"].decode()
    assert "rows.jsonl" in text and "| learning_rate |" in text and "optimizer steps" in text
    assert not [name for name, content in files.items() if str(tmp_path / "rows.jsonl").encode() in content]
    assert "profile" in record and "profile" not in json.loads(files["gazelle.json"])["run"]
    assert not [name for name in files if name.endswith((".bin", ".pt", ".html"))]
    assert not [name for name, content in files.items() if TOKEN.encode() in content]


@pytest.mark.parametrize(("part", "failure", "says"), [
    ("/api/repos/create", 401, "knows no such user or token"), ("/api/repos/create", 403, "may not write there"),
    ("/preupload/", 503, "trouble of its own"), ("/objects/batch", 500, "trouble of its own"),
    ("/objects/", "drop", "broke off"), ("/commit/", 500, "trouble of its own"), ("/commit/", "drop", "broke off"),
    ("/commit/", 403, "may not write there"),
])
def test_a_push_that_fails_commits_nothing_and_says_what_to_do(part, failure, says, hub, adapted):
    model, _ = adapted
    hub.fails[part] = failure
    with pytest.raises(HubError, match=says) as caught:
        model.push_to_hub("user/adapter", token=TOKEN)
    assert caught.value.fix and caught.value.exit_code == 2
    assert TOKEN not in str(caught.value)
    assert hub.repositories.get("user/adapter", {}) == {} and hub.commits == []


def test_refusals_before_anything_is_computed(hub, adapted, monkeypatch):
    model, _ = adapted
    monkeypatch.setattr("gazelle.facade.hub.save_checkpoint", None)
    with pytest.raises(HubError, match="knows no such user or token") as caught:
        model.push_to_hub("user/adapter", token="hf_wrong")
    assert "hf auth login" in caught.value.fix
    with pytest.raises(HubError, match="may not write there"):
        model.push_to_hub("others/adapter", token=TOKEN)
    with pytest.raises(HubError, match="name of a repository"):
        model.push_to_hub("user/a/b", token=TOKEN)
    with pytest.raises(OptionError, match="no such way"):
        model.push_to_hub_merged("user/new", token=TOKEN, save_method="q4")
    assert "user/new" not in hub.repositories
    with pytest.raises(OptionError, match="unknown option"):
        model.push_to_hub("user/adapter", token=TOKEN, commit_mesage="typo")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="may not be asked"):
        model.push_to_hub("user/adapter", token=TOKEN)


def test_bits_become_the_nearest_kind():
    assert _methods(None, 4, 64, True) == "q4_k_m"
    assert _methods(None, None, None, None) == "q8_0"
    assert _methods("q6_k", None, None, None) == "q6_k"
    with pytest.raises(OptionError, match="so many bits") as caught:
        _methods(None, 7, None, None)
    assert "quantization_bits=6" in caught.value.fix
    with pytest.raises(OptionError, match="no such GGUF"):
        _methods("q7", None, None, None)
    with pytest.raises(OptionError, match="both"):
        _methods("q6_k", 4, None, None)
