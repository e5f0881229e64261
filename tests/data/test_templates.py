"""Each template against the documented format, written out by hand, and the choice of one for a tokenizer."""

from typing import Any

import pytest

from gazelle.base.errors import ModelError, OptionError
from gazelle.data.templates import TEMPLATES, choose_template, ensure_template, get_template

CHAT = [{"role": "system", "content": "S"}, {"role": "user", "content": "U1"}, {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "U2"}]
EXPECTED = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
              "<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\n",
    "llama-3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
               "<|start_header_id|>user<|end_header_id|>\n\nU1<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
               "<|start_header_id|>user<|end_header_id|>\n\nU2<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "phi-3": "<|system|>\nS<|end|>\n<|user|>\nU1<|end|>\n<|assistant|>\nA1<|end|>\n"
             "<|user|>\nU2<|end|>\n<|assistant|>\n",
    "phi-4": "<|im_start|>system<|im_sep|>S<|im_end|><|im_start|>user<|im_sep|>U1<|im_end|>"
             "<|im_start|>assistant<|im_sep|>A1<|im_end|><|im_start|>user<|im_sep|>U2<|im_end|>"
             "<|im_start|>assistant<|im_sep|>",
    "gemma": "<bos><start_of_turn>user\nS\n\nU1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n"
             "<start_of_turn>user\nU2<end_of_turn>\n<start_of_turn>model\n",
    "mistral": "<s>[INST] S\n\nU1[/INST] A1</s>[INST] U2[/INST]",
    "qwen": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
            "<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\n",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_documented_format(name: str, tokenizers: dict[str, Any]) -> None:
    render = tokenizers[name].apply_chat_template
    assert render(CHAT, tokenize=False, add_generation_prompt=True) == EXPECTED[name]
    without_system = EXPECTED[name]
    for opening in ("<|im_start|>system\nS<|im_end|>\n", "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>",
                    "<|system|>\nS<|end|>\n", "<|im_start|>system<|im_sep|>S<|im_end|>", "S\n\n"):
        without_system = without_system.replace(opening, "")
    assert render(CHAT[1:], tokenize=False, add_generation_prompt=True) == without_system


def test_qwen_tools(tokenizers: dict[str, Any]) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": "ż"}}}
    chat = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "", "tool_calls": [call, call]},
            {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    text = tokenizers["qwen"].apply_chat_template(chat, tools=[{"name": "add"}], tokenize=False)
    assert text == (
        "<|im_start|>system\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"name": "add"}\n</tools>\n\nFor each function call, return a json object with function name and arguments '
        'within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": '
        "<args-json-object>}\n</tool_call><|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": "ż"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "add", "arguments": {"a": "ż"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n")


def test_llama_calls_tool_results_ipython(tokenizers: dict[str, Any]) -> None:
    text = tokenizers["llama-3"].apply_chat_template([{"role": "tool", "content": "1"}], tokenize=False)
    assert "<|start_header_id|>ipython<|end_header_id|>\n\n1<|eot_id|>" in text


@pytest.mark.parametrize(("model_type", "template"), [
    ("llama", "llama-3"), ("qwen3_moe", "qwen"), ("phi3", "phi-3"), ("phi3", "phi-4"), ("gemma3_text", "gemma"),
    ("mistral", "mistral"), ("llama", "chatml"), ("new_family", "chatml"), ("new_family", "gemma"),
])
def test_choice_goes_by_the_vocabulary(model_type: str, template: str, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(None, TEMPLATES[template])
    assert choose_template(tokenizer, model_type) == template
    ensure_template(tokenizer, model_type)
    assert tokenizer.chat_template == get_template(template)


def test_own_template_stays_unless_another_is_named(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer("{{ 'mine' }}", TEMPLATES["chatml"])
    ensure_template(tokenizer, "llama")
    assert tokenizer.chat_template == "{{ 'mine' }}"
    ensure_template(tokenizer, "llama", "Qwen2.5")
    assert tokenizer.chat_template == get_template("qwen")
    ensure_template(tokenizer, "llama", "{% for message in messages %}{{ message.content }}{% endfor %}")
    assert tokenizer.chat_template.startswith("{% for")


def test_templates_that_do_not_fit(make_tokenizer: Any) -> None:
    plain = make_tokenizer(None, ())
    assert choose_template(plain, "llama") is None
    with pytest.raises(ModelError, match="none fits") as caught:
        ensure_template(plain, "llama")
    assert "<|im_start|>" in str(caught.value.found)
    assert "chat_template=" in caught.value.fix
    with pytest.raises(ModelError, match="does not fit") as caught:
        ensure_template(make_tokenizer(None, TEMPLATES["gemma"]), "gemma", "llama-3")
    assert "<|eot_id|>" in str(caught.value.found)
    assert "gemma" in caught.value.fix
    with pytest.raises(OptionError, match="lama-3") as caught:
        get_template("lama-3")
    assert "llama-3" in caught.value.fix
