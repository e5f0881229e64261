"""Asks an export, in the program that is going to read it, what the model in memory was asked, and compares."""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gazelle.base.errors import UserError, shorten
from gazelle.base.files import write_text
from gazelle.base.log import logger
from gazelle.base.optional import version
from gazelle.base.progress import tell
from gazelle.export.consumers.llama import find_library
from gazelle.export.verify_probe import Probe, Reference
from gazelle.models.gguf_file import read_gguf

_NO_LLAMA = "not verified: llama.cpp is not installed; name the folder of an unpacked release with --llama"
_NO_ORT = "not verified: onnxruntime is not installed; pip install gazelle[onnx]"
_WORSE = 1.5  # no way of quantising that is of use raises the perplexity so much
_OTHERWISE = 1.1  # rounding to 16 bits moves it far less: of a model of 135M, in bfloat16, by 6 % on one short text


@dataclass(frozen=True)
class Check:
    """One line of the table. `ok` is None for what is measured and has no limit."""

    name: str
    found: str
    ok: bool | None
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verification:
    """What came of asking one export.

    Attributes:
        export: the file or folder.
        consumer: the program that read it, with its version; empty if none did.
        source: where the prompts came from.
        note: what was not possible, and what to install for it; empty if nothing was amiss.
        checks: in the order of the table.
    """

    export: str
    consumer: str
    source: str
    note: str
    checks: list[Check]

    @property
    def wrong(self) -> list[str]:
        """Names of the checks that failed."""
        return [check.name for check in self.checks if check.ok is False]

    def write(self) -> Path:
        """Write it as JSON: `verification.json` in an export's folder, beside a file with that file's name."""
        path = Path(self.export)
        target = path / "verification.json" if path.is_dir() else path.with_suffix(".verification.json")
        content = {"gazelle_verification": 1} | asdict(self) | {"export": path.name, "wrong": self.wrong}
        write_text(target, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        return target


def verify(path: Path, kind: str, probe: Probe, reference: Reference, tokenizer: Any, *, llama: str | None = None,
           vllm: str | None = None, base: dict[str, Any] | None = None, lora: Path | None = None,
           whole: bool = False) -> Verification:
    """Ask one export.

    Args:
        path: a GGUF file, or a folder.
        kind: "gguf", "hf" (a folder of safetensors, or an adapter), "vllm" or "onnx" (folders as well).
        probe, reference: from `make_probe` and `ask_model`.
        tokenizer: the model's; it renders the conversations with the export's own template.
        llama: where llama.cpp is, as `find_library` takes it.
        vllm: a Python that has vLLM, which then reads all but GGUF and ONNX.
        lora: an adapter as GGUF, which is what is verified; `path` is its base then.
        base: for an adapter, how its base is loaded: `folder`, `load_in_4bit`, `rows` and so on.
        whole: the weights have 16 bits or more, so that its perplexity has to be that of the model in memory.
    """
    tell(f"verifying {path.name}")
    request = probe.request() | {"path": str(path)}
    if base is not None:
        request["base"] = base
    name, note = "hf", ""
    command = [sys.executable, "-m", "gazelle.export.consumers"]
    if kind == "gguf":
        library = find_library(llama)
        if library is None:
            return Verification(str(path), "", probe.source, _NO_LLAMA, [])
        template = read_gguf(path).get("tokenizer.chat_template", str, "")
        rendered = [tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False,
                                                  add_generation_prompt=True) for chat in probe.chats if template]
        name, request = "llama", request | {"library": str(library), "chats": rendered}
        if lora is not None:
            request["lora"] = str(lora)
    elif kind == "onnx":
        if version("onnxruntime") is None:
            return Verification(str(path), "", probe.source, _NO_ORT, [])
        name = "ort"
    elif vllm is not None:
        name, command = "vllm", [vllm, str(Path(__file__).parent / "consumers" / "vllm_script.py")]
    elif kind == "vllm":
        note = "vLLM was not asked, but transformers: name a Python that has vLLM with --vllm"
    export = str(lora or path)
    try:
        given, logits = run_consumer(command if name == "vllm" else [*command, name], request)
    except ConsumerError as error:
        return Verification(export, "", probe.source, f"{name}: {error}",
                            [Check("loads", shorten(str(error), 60), ok=False)])
    return Verification(export, given["consumer"], probe.source, note,
                        compare(probe, reference, given, logits, whole=whole))


class ConsumerError(Exception):
    """A consumer did not get to its answers."""


def run_consumer(command: list[str], request: dict[str, Any]
                 ) -> tuple[dict[str, Any], "np.ndarray[Any, np.dtype[np.float32]] | None"]:
    """Run a consumer on a request; its answers, and the logits kept.

    Raises:
        ConsumerError: it crashed, or said why it could not answer.
    """
    with tempfile.TemporaryDirectory(prefix="gazelle-verify-") as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        done = subprocess.run([*command, str(asked), str(answered)], capture_output=True, text=True, check=False,
                              errors="replace")
        given = json.loads(answered.read_text(encoding="utf-8")) if answered.exists() else {}
        if "refused" in given:
            raise ConsumerError(UserError(**given["refused"]))
        if done.returncode or not given:
            logger.error("%s", done.stderr[-2000:])
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
            errors = [line for line in said if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
            raise ConsumerError(f"ended with {done.returncode}: {(errors or said)[-1]}")
        logits = answered.with_suffix(".npy")
        return given, np.load(logits, allow_pickle=False) if logits.exists() else None


def compare(probe: Probe, reference: Reference, given: dict[str, Any],
            logits: "np.ndarray[Any, np.dtype[np.float32]] | None", *, whole: bool = False) -> list[Check]:
    """The lines of the table."""
    checks = [_ids("token ids", probe.text_ids, given["texts"])]
    if probe.chats:
        checks.append(_ids("template", probe.prompts[:len(probe.chats)], given["chats"]))
    if given.get("ends") is not None:
        missed = sorted(set(probe.stops) - set(given["ends"]))
        checks.append(Check("stop tokens", "the same" if not missed else f"goes on after {missed}", ok=not missed,
                            values={"missed": missed}))
    checks.append(_answers(reference.given["answers"], given["answers"]))
    ours, theirs = (np.concatenate([np.array(row, float) for row in side["logprobs"]])
                    for side in (reference.given, given))
    same = [left == right for a, b in zip(reference.given["likeliest"], given["likeliest"], strict=True)
            for left, right in zip(a, b, strict=True)]
    checks.append(Check("likeliest token", f"{np.mean(same):.1%} of {len(same)}", ok=None,
                        values={"same": int(np.sum(same)), "of": len(same)}))
    checks.append(_logits(reference.logits, logits, ours, theirs))
    before, after = (float(np.exp(-side.mean())) for side in (ours, theirs))
    moved = theirs - ours
    # Of a few tokens rounding alone moves the mean: three standard errors of it are chance.
    chance = 3 * moved.std() / np.sqrt(len(moved))
    right = abs(moved.mean()) < max(np.log(_OTHERWISE), chance) if whole else after < before * _WORSE
    checks.append(Check("perplexity", f"{before:.3f} → {after:.3f}", ok=bool(right),
                        values={"in_memory": before, "export": after, "tokens": len(ours)}))
    return checks


def _ids(name: str, wanted: list[list[int]], found: list[list[int] | None]) -> Check:
    same = [a == b for a, b in zip(wanted, found, strict=False)]
    right = sum(same)
    return Check(name, f"{right} of {len(wanted)} the same", ok=right == len(wanted),
                 values={"same": right, "of": len(wanted), "first_wrong": next(
                     (i for i in range(len(wanted)) if i >= len(same) or not same[i]), None)})


def _answers(wanted: list[list[int]], found: list[list[int]]) -> Check:
    same = sum(a == b for a, b in zip(wanted, found, strict=True))
    leading = sum(next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
                  for a, b in zip(wanted, found, strict=True))
    total = sum(map(len, wanted))
    return Check("greedy answers", f"{same} of {len(wanted)}, {leading / max(total, 1):.0%} of tokens", ok=None,
                 values={"same": same, "of": len(wanted), "leading_tokens": leading, "tokens": total})


def _logits(ours: "np.ndarray[Any, Any]", theirs: "np.ndarray[Any, Any] | None", our_logprobs: "np.ndarray[Any, Any]",
            their_logprobs: "np.ndarray[Any, Any]") -> Check:
    """Of whole logits where the consumer gives them, else of the logarithms of probability."""
    if theirs is None:
        error, name = np.abs(our_logprobs - their_logprobs), "error of log-probability"
    else:
        columns = min(ours.shape[1], theirs.shape[1])  # a padded vocabulary on one side
        error, name = np.abs(ours[:, :columns] - theirs[:, :columns]), "error of logits"
    largest, rms = float(error.max(initial=0)), float(np.sqrt(np.square(error.astype(float)).mean()))
    return Check(name, f"{largest:.2g} at most, {rms:.2g} rms", ok=None if np.isfinite(largest) else False,
                 values={"largest": largest, "rms": rms, "values": int(error.size)})
