"""Exports a model for Ollama: GGUF files, and Modelfiles with the chat template, stop tokens and length of training.

Ollama renders conversations with Go's text/template: .Messages holds all of them, each with .Role and .Content, after
messages of one role in a row were joined. Facts: Ollama's docs/modelfile.md and template/template.go.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import ModelError
from gazelle.base.files import check_writable, write_text
from gazelle.base.log import logger
from gazelle.data.spans import Renderer
from gazelle.export.chat_format import ROLES, ChatFormat, chat_format
from gazelle.export.checks import check_no_folder
from gazelle.export.gguf import export_gguf
from gazelle.export.gguf_recipe import find_recipes
from gazelle.models.special_tokens import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPACE = '" " "\\n" "\\t" "\\r" "\\v" "\\f"'
# Go's templates have no function for this. `len (slice . 1)` is one less than the length.
_TRIM = ('{{ define "trim" }}{{ if . }}{{ $end := len (slice . 1) }}'
         '{{ if eq (slice . 0 1) ' + _SPACE + ' }}{{ template "trim" (slice . 1) }}'
         '{{ else if eq (slice . $end) ' + _SPACE + ' }}{{ template "trim" (slice . 0 $end) }}'
         "{{ else }}{{ . }}{{ end }}{{ end }}{{ end }}")


def export_ollama(model: Any, tokenizer: "PreTrainedTokenizerBase", folder: str | Path,
                  methods: str | list[str] = "q8_0", *, calibration: Any = None) -> list[Path]:
    """Write GGUF files and a Modelfile for each to `folder`; then `ollama create NAME -f folder/Modelfile`.

    The first file's Modelfile is called `Modelfile`, that of another one `Modelfile-Q4_K_M` and the like.

    Args:
        model, methods, calibration: as for `export_gguf`.
        tokenizer: the one it was trained with. Its chat template is written in Ollama's language, without tools.
        folder: made if need be. Files of other names in it stay.

    Returns:
        The GGUF files and the Modelfiles.

    Raises:
        OptionError: an unknown method.
        ModelError: as for `export_gguf`, or a chat template that does more than Ollama's can.
        OutputError: the folder cannot be written to, or the disk is too full.
    """
    target = Path(folder).expanduser().absolute()
    texts = {f"Modelfile-{name.upper()}" if number else "Modelfile":
             modelfile(model, tokenizer, f"model-{name.upper()}.gguf")
             for number, name in enumerate(find_recipes(methods))}
    check_writable(target)
    for name in texts:
        check_no_folder(target / name)
    files = export_gguf(model, tokenizer, target, methods, calibration=calibration, add_bos=_adds_bos(tokenizer))
    for name, text in texts.items():
        write_text(target / name, text)
        files.append(target / name)
    return files


def modelfile(model: Any, tokenizer: "PreTrainedTokenizerBase", file: str) -> str:
    """The text of a Modelfile for the GGUF file of the name `file`, which lies beside it.

    Raises:
        ModelError: a chat template that does more than Ollama's can.
    """
    base = unwrap(model)
    found = chat_format(tokenizer)
    if "strftime_now" in str(tokenizer.chat_template):
        logger.warning("The chat template writes the day's date: the Modelfile has today's from now on.")
    if not found.takes_system:
        logger.warning("The chat template takes no system message: in Ollama they are left out.")
    template = go_template(found, bos="" if not _adds_bos(tokenizer) else tokenizer.bos_token)
    parts = [f"FROM ./{file}", f"TEMPLATE {_quoted(template)}"]
    if found.default_system:
        parts.append(f"SYSTEM {_quoted(found.default_system)}")
    generation = getattr(base, "generation_config", None)
    parts += [f"PARAMETER stop {_stop(text)}" for text in stop_texts(tokenizer, generation)]
    length = getattr(model, "max_seq_length", None) or base.config.get_text_config().max_position_embeddings
    parts.append(f"PARAMETER num_ctx {int(length)}")
    # What Ollama would have of its own otherwise, and what the model's own settings say.
    parts.append(f"PARAMETER repeat_penalty {float(getattr(generation, 'repetition_penalty', None) or 1.0):g}")
    if getattr(generation, "do_sample", False):
        parts += [f"PARAMETER {name} {value:g}" for name in ("temperature", "top_p", "top_k")
                  if (value := getattr(generation, name, None)) is not None]
    return "\n".join(parts) + "\n"


def stop_texts(tokenizer: Any, generation: Any) -> list[str]:
    """The texts of the tokens that end an answer: the tokenizer's, the model's, and that of the chat template."""
    ids = [tokenizer.eos_token_id, *stop_ids(generation)]
    texts = [tokenizer.convert_ids_to_tokens(index) for index in ids if index is not None]
    closing = Renderer(tokenizer).closing
    if closing:
        texts.append(tokenizer.convert_ids_to_tokens(tokenizer(closing, add_special_tokens=False)["input_ids"][-1]))
    return list(dict.fromkeys(texts))


def go_template(found: ChatFormat, bos: str = "") -> str:
    """`found` in the language of Go's text/template, with the variables that Ollama sets.

    An assistant's message in last place is left open, to be gone on with.

    Args:
        found: what is written around messages.
        bos: what Ollama writes before the text itself, so that it is left out here.
    """
    start, alone = (_literal(text.removeprefix(bos)) for text in (found.start, found.start_alone))
    texts = {role: '{{ template "trim" .Content }}' if role in found.trimmed else "{{ .Content }}" for role in ROLES}
    after = {role: _literal(text) for role, text in found.after.items()}
    if found.inner_system:
        system = '{{ template "trim" $system }}' if "system" in found.trimmed else "{{ $system }}"
        texts["user"] = ("{{ if $system }}" + _literal(found.before["system"]) + system + after["system"]
                         + '{{ $system = "" }}{{ end }}' + texts["user"])
    after["assistant"] = "{{ if not $last }}" + after["assistant"] + "{{ end }}"
    roles = ROLES if found.takes_system and not found.inner_system else ROLES[1:]
    turns = [f'if eq .Role "{role}" }}}}' + _literal(found.before[role]) + texts[role] + after[role] for role in roles]
    parts = [_TRIM if found.trimmed else "", "{{ $system := .System }}" if found.inner_system else "",
             start if start == alone else "",
             "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"]
    if start != alone:
        parts += ['{{ if eq $i 0 }}{{ if eq .Role "system" }}', start, "{{ else }}", alone, "{{ end }}{{ end }}"]
    parts += ["{{ ", "{{ else ".join(turns), "{{ end }}"]
    if found.generation:
        parts += ['{{ if and $last (ne .Role "assistant") }}', _literal(found.generation), "{{ end }}"]
    return "".join([*parts, "{{ end }}"])


def _adds_bos(tokenizer: Any) -> bool:
    """Whether Ollama is to put BOS before a prompt, which the template then leaves out: if training's text has it."""
    bos = tokenizer.bos_token
    return bool(bos) and chat_format(tokenizer).start_alone.startswith(bos)


def _literal(text: str) -> str:
    """Text as it stands, in a template."""
    return text.replace("{{", '{{ "{{" }}')


def _quoted(text: str) -> str:
    if '"""' in text:
        raise ModelError("a Modelfile cannot hold three quotation marks in a row", where="tokenizer.chat_template",
                         found='"""', expected="a template without them", fix="change the chat template")
    return f'"""{text}"""'


def _stop(text: str) -> str:
    return f'"{text}"' if '"' not in text else _quoted(text)
