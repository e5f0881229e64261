"""A Modelfile's template renders in Go's language what the chat template renders in training."""

import json
import re
import shutil
import subprocess

import jinja2
import pytest
from tests.export.conftest import byte_level, sentencepiece
from tests.gotemplate import Template
from tests.llama import Llama

from gazelle.base.errors import ModelError, OutputError
from gazelle.data.templates import TEMPLATES, get_template
from gazelle.export.chat_format import chat_format
from gazelle.export.ollama import export_ollama, go_template, modelfile
from gazelle.models.gguf_file import read_gguf

PLAIN = [("user", "a"), ("assistant", "b"), ("user", "c{{ .System }}\n{% x %}"), ("assistant", "d'\"\\"),
         ("user", "é🙂 ")]
SYSTEM = ("system", "Be brief.\n\nAnd {kind}.")
CASES = {
    "question": PLAIN[:1], "turns": PLAIN[:3], "more turns": PLAIN, "system": [SYSTEM, *PLAIN[:1]],
    "system and turns": [SYSTEM, *PLAIN],
    "white space": [("system", "\n s \t"), ("user", "  \r\n"), ("assistant", " b\n"), ("user", "\v\f")],
}
GO = '''package main
import ("encoding/json"; "os"; "strings"; "text/template")
type Message struct { Role, Content string }
type Case struct { Template, System string; Messages []*Message }
func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
	texts := []string{}
	for _, c := range cases {
		t := template.Must(template.New("").Option("missingkey=zero").Parse(c.Template))
		var b strings.Builder
		if err := t.Execute(&b, map[string]any{"System": c.System, "Messages": c.Messages, "Tools": nil,
			"Response": ""}); err != nil { panic(err) }
		texts = append(texts, b.String())
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
'''


def tokenizers():
    for name in TEMPLATES:
        tokenizer = byte_level(bos_token="<|endoftext|>")
        tokenizer.chat_template = get_template(name)
        yield name, tokenizer
    llama_2 = sentencepiece()
    llama_2.chat_template = (  # as on the hub, its system message inside of the first question
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
        "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}"
        "{% endif %}{% for message in loop_messages %}"
        "{% if loop.index0 == 0 and system_message %}{% set content = '<<SYS>>\\n' + "
        "system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}"
        "{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content + ' [/INST]' }}{% elif "
        "message['role'] == 'assistant' %}{{ ' ' + content + ' ' + eos_token }}{% endif %}{% endfor %}")
    yield "llama-2", llama_2


@pytest.fixture(scope="module")
def known(demo_tokenizer):
    return dict(tokenizers()) | {"demo": demo_tokenizer}


def rendered(tokenizer, messages):
    turns = [{"role": role, "content": content} for role, content in messages]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def data(template, messages):
    """What Ollama gives a template."""
    return {"Template": template, "System": "\n\n".join(text for role, text in messages if role == "system"),
            "Messages": [{"Role": role, "Content": content} for role, content in messages]}


NAMES = [*TEMPLATES, "llama-2", "demo"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_templates_render_as_in_training(name, case, known):
    values = data(go_template(chat_format(known[name])), CASES[case])
    assert Template(values["Template"]).execute(values) == rendered(known[name], CASES[case])


@pytest.mark.skipif(not shutil.which("go"), reason="Go is not installed")
def test_templates_in_go_itself(known, tmp_path):
    (tmp_path / "main.go").write_text(GO)
    asked = [(name, messages) for name in NAMES for messages in CASES.values()]
    values = [data(go_template(chat_format(known[name])), messages) for name, messages in asked]
    out = subprocess.run(["go", "run", "main.go"], cwd=tmp_path, input=json.dumps(values), check=True, text=True,
                         capture_output=True).stdout
    for (name, messages), text, each in zip(asked, json.loads(out), values, strict=True):
        assert text == rendered(known[name], messages), name
        assert text == Template(each["Template"]).execute(each), name


def test_an_answer_in_last_place_is_left_open(known):
    messages = [*PLAIN[:1], ("assistant", "It is")]
    for name in NAMES:
        values = data(go_template(chat_format(known[name])), messages)
        turns = [{"role": role, "content": content} for role, content in messages]
        want = known[name].apply_chat_template(turns, tokenize=False, continue_final_message=True)
        assert Template(values["Template"]).execute(values) == want, name


def test_a_message_of_the_system_s_in_between(known):
    messages = [*PLAIN[:2], SYSTEM, *PLAIN[:1]]
    for name in ("chatml", "phi-3", "phi-4", "demo"):
        values = data(go_template(chat_format(known[name])), messages)
        assert Template(values["Template"]).execute(values) == rendered(known[name], messages), name


@pytest.mark.parametrize(("template", "what"), [
    ("{% for m in messages %}{{ m.role + m.content if not loop.last else m.content }}{% endfor %}", "otherwise"),
    ("{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}", "left out"),
    ("{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}\n{% endfor %}", "changed"),
    ("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.content | length }}\n{% endfor %}", "."),
    ("{{ raise_exception('no') }}", "refuses"), ("{{ messages[-1].content }}", "."), (None, "no chat template"),
])
def test_what_cannot_be_said_in_ollama_s_language_is_refused(template, what, tokenizer, model, tmp_path):
    changed = byte_level()
    changed.chat_template = template
    with pytest.raises(ModelError, match=what) as caught:
        export_ollama(model("llama"), changed, tmp_path / "out")
    assert caught.value.fix
    assert not (tmp_path / "out").exists()


def test_system_messages_that_the_template_refuses_are_left_out(tokenizer, caplog, model):
    changed = byte_level()
    changed.chat_template = ("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
                             "<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}"
                             "<assistant>{% endif %}")
    with pytest.raises(jinja2.TemplateError):
        rendered(changed, [SYSTEM, *PLAIN])
    values = data(go_template(chat_format(changed)), [SYSTEM, *PLAIN])
    assert Template(values["Template"]).execute(values) == rendered(changed, PLAIN)
    modelfile(model("llama"), changed, "m.gguf")
    assert "takes no system message" in caplog.text


def parsed(path):
    """A Modelfile's instructions, read as Ollama does: values in one or three quotation marks stand as they are."""
    found = re.findall(r'^([A-Z]+) (?:(\w+) )??(?:"""(.*?)"""|"(.*?)"|(\S+))$', path.read_text(), re.M | re.S)
    return [(command, name, triple or quoted or plain) for command, name, triple, quoted, plain in found]


def test_files_and_modelfiles(model, tokenizer, tmp_path):
    original = model("llama")
    original.generation_config.eos_token_id = [2, 0]
    original.max_seq_length = 64
    files = export_ollama(original, tokenizer, tmp_path, "f16,q8_0")
    assert [file.name for file in files] == ["model-F16.gguf", "model-Q8_0.gguf", "Modelfile", "Modelfile-Q8_0"]
    for gguf, path in zip(files[:2], files[2:], strict=True):
        lines = parsed(path)
        assert lines[0] == ("FROM", "", f"./{gguf.name}")
        assert lines[1] == ("TEMPLATE", "", go_template(chat_format(tokenizer)))
        assert lines[2:] == [("PARAMETER", "stop", "<|im_end|>"), ("PARAMETER", "stop", "<|endoftext|>"),
                             ("PARAMETER", "num_ctx", "64"), ("PARAMETER", "repeat_penalty", "1")]
    (tmp_path / "Modelfile").unlink()
    (tmp_path / "Modelfile").mkdir()
    with pytest.raises(OutputError, match="a folder has the name"):
        export_ollama(original, tokenizer, tmp_path, "f16")


def test_the_demo_model_s_own_template(demo_model, demo_tokenizer, tmp_path):
    text = tmp_path / "Modelfile"
    text.write_text(modelfile(demo_model(), demo_tokenizer, "m.gguf"))
    lines = parsed(text)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert ("SYSTEM", "", system) in lines
    assert [value for command, name, value in lines if name == "stop"] == ["<|im_end|>"]
    template = next(value for command, _, value in lines if command == "TEMPLATE")
    values = data(template, [("system", system), *PLAIN])  # what Ollama sends where the user gives none
    assert Template(template).execute(values) == rendered(demo_tokenizer, PLAIN)


@pytest.mark.parametrize("name", ["gemma", "chatml"])
def test_bos_is_there_once_or_not_at_all_as_in_training(name, model, tmp_path):
    """Ollama has llama.cpp put it there, if the file says so; whatever the tokenizer does with plain texts."""
    from tokenizers import processors

    changed = byte_level()
    changed.chat_template = get_template(name)
    changed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    gguf, path = export_ollama(model("llama"), changed, tmp_path, "f16")
    template = next(value for command, _, value in parsed(path) if command == "TEMPLATE")
    values = data(template, PLAIN[:3])
    text = Template(template).execute(values)
    with Llama(gguf) as llama:
        got = llama.tokenize(text, special=True)
    assert got == changed(rendered(changed, PLAIN[:3]), add_special_tokens=False)["input_ids"]
    assert read_gguf(gguf).metadata["tokenizer.ggml.add_bos_token"] == (name == "gemma")
