"""`gazelle chat`."""

import sys
from pathlib import Path

import typer

from gazelle.facade.language_model import FastLanguageModel
from gazelle.models.generate import stream_text
from gazelle.models.record import RECORD


def chat_command(
    model_name: str, *, system: str | None, max_new_tokens: int, temperature: float, load_in_4bit: bool
) -> None:
    """Answer what is typed, a line a turn, until the input ends or says /exit. /new forgets the conversation."""
    # An adapter's record says how its base was kept in training, and that is how it answers best.
    recorded = (Path(model_name) / RECORD).exists()
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name, load_in_4bit=None if recorded and not load_in_4bit else load_in_4bit)
    FastLanguageModel.for_inference(model)
    interactive = sys.stdin.isatty()
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    if interactive:
        typer.echo("Type a message; /new starts over, /exit or Ctrl-D ends.")
    while True:
        if interactive:
            typer.echo("\n> ", nl=False)
        line = sys.stdin.readline()
        text = line.strip()
        if not line or text == "/exit":
            return
        if not text:
            continue
        if text == "/new":
            messages = list(opening)
            continue
        if not interactive:
            messages = list(opening)  # piped questions have nothing to do with one another
        messages.append({"role": "user", "content": text})
        answer = ""
        for piece in stream_text(model, tokenizer, messages, max_new_tokens=max_new_tokens, temperature=temperature):
            typer.echo(piece, nl=False)
            sys.stdout.flush()
            answer += piece
        typer.echo()
        messages.append({"role": "assistant", "content": answer})
