"""The guard on labelled texts, and its speed.

    python -m benchmarks.guard                # prints, and writes benchmarks/results/guard.json
    python -m benchmarks.guard --misses       # prints what is wrong, of the texts that rules may be tuned on

`guard_texts.jsonl` holds texts in which [[kind:...]] marks what is to be found; {{name}} is a credential made up here,
so that no file holds anything that looks like a live one. What is held out was written before it was measured; four
misses have been mended since (docs/log.md).

A label is found if one finding of its kind covers all of it; a finding is right if it touches a label. Speed is the
median of five checks of 1 MB, with all detectors and three patterns.
"""

import argparse
import base64
import json
import random
import re
import statistics
import string
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gazelle import SafetyChecker
from gazelle.base.machine import machine_facts

TEXTS = Path(__file__).with_name("guard_texts.jsonl")
RESULT = Path(__file__).parent / "results" / "guard.json"
PATTERNS = (r"(?i)(password|credit card|ssn)", r"(?i)\bmake a bomb\b", "密码|信用卡|身份证号")
_ALNUM, _HEX = string.ascii_letters + string.digits, "0123456789abcdef"
_URL_SAFE = _ALNUM + "-_"
_MARK = re.compile(r"\[\[(\w+):(.*?)\]\](?!\])", re.DOTALL)
_MADE = re.compile(r"\{\{(\w+)(?:\|(\w+))?\}\}")
_SAME = {"github_pat": "github_token", "openai_project_key": "openai_key"}


@dataclass(frozen=True)
class Labelled:
    """A text with (kind, start, end) of what is to be found in it."""

    text: str
    labels: tuple[tuple[str, int, int], ...]
    split: str
    part: str
    group: str
    lang: str


def texts() -> list[Labelled]:
    """Every labelled text, with credentials made from a fixed seed."""
    rng, found = random.Random(7), []
    for line in TEXTS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        marked = _MADE.sub(lambda made: _credential(rng, made), row.pop("text"))
        text, labels, position = "", [], 0
        for mark in _MARK.finditer(marked):
            text += marked[position:mark.start()]
            labels.append((mark[1], len(text), len(text) + len(mark[2])))
            text += mark[2]
            position = mark.end()
        found.append(Labelled(text + marked[position:], tuple(labels), **row))
    return found


def _credential(rng: random.Random, made: re.Match[str]) -> str:
    """A credential in place of its name, marked unless it stands inside a mark."""
    name, disguise = made.groups()
    value = _make(rng, name)
    if disguise == "zw":
        value = "\u200b".join(value)
    elif disguise == "wide":
        value = "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in value)
    inside = re.search(r"\[\[\w+:$", made.string[:made.start()])
    return value if inside else f"[[{_SAME.get(name, name)}:{value}]]"


def _make(rng: random.Random, name: str) -> str:
    def some(letters: str, count: int) -> str:
        return "".join(rng.choice(letters) for _ in range(count))

    def token(value: Any) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    upper = string.ascii_uppercase
    return {
        "aws_key": lambda: "AKIA" + some(upper + "234567", 16),
        "aws_secret": lambda: some(_ALNUM + "+/", 40),
        "github_token": lambda: "ghp_" + some(_ALNUM, 36),
        "github_pat": lambda: f"github_pat_{some(_ALNUM, 22)}_{some(_ALNUM, 59)}",
        "gitlab_token": lambda: "glpat-" + some(_URL_SAFE, 20),
        "openai_key": lambda: "sk-" + some(_ALNUM, 48),
        "openai_project_key": lambda: "sk-proj-" + some(_URL_SAFE, 64),
        "anthropic_key": lambda: "sk-ant-api03-" + some(_URL_SAFE, 93),
        "huggingface_token": lambda: "hf_" + some(_ALNUM, 34),
        "slack_token": lambda: f"xoxb-{some('123456789', 12)}-{some(_ALNUM, 24)}",
        "slack_webhook": lambda: f"hooks.slack.com/services/T{some(upper, 8)}/B{some(upper, 8)}/{some(_ALNUM, 24)}",
        "stripe_key": lambda: "sk_live_" + some(_ALNUM, 24),
        "google_key": lambda: "AIza" + some(_URL_SAFE, 35),
        "npm_token": lambda: "npm_" + some(_ALNUM, 36),
        "pypi_token": lambda: "pypi-AgEIcHlwaS5vcmc" + some(_URL_SAFE, 70),
        "sendgrid_key": lambda: f"SG.{some(_URL_SAFE, 22)}.{some(_URL_SAFE, 43)}",
        "telegram_token": lambda: f"{some('123456789', 9)}:AA{some(_URL_SAFE, 33)}",
        "aliyun_key": lambda: "LTAI" + some(_ALNUM, 20),
        "tencent_key": lambda: "AKID" + some(_ALNUM, 32),
        "jwt": lambda: (
            f"{token({'alg': 'HS256', 'typ': 'JWT'})}.{token({'sub': some('0123456789', 10)})}.{some(_URL_SAFE, 43)}"
        ),
        "private_key": lambda: "\n".join(
            [
                "-----BEGIN RSA PRIVATE KEY-----",
                *(some(_ALNUM + "+/", 64) for _ in range(5)),
                some(_ALNUM, 30) + "==",
                "-----END RSA PRIVATE KEY-----",
            ]
        ),
        "hex32": lambda: some(_HEX, 32),
        "hex40": lambda: some(_HEX, 40),
        "base40": lambda: some(_ALNUM, 40),
    }[name]()


def checkers() -> dict[str, SafetyChecker]:
    """Part -> what it is tried with: patterns alone, and everything else alone."""
    rest = SafetyChecker()
    return {"pattern": SafetyChecker(PATTERNS, pii="off", secrets="off"), "pii": rest, "secret": rest}


def outcomes(labelled: list[Labelled]) -> Iterator[tuple[Labelled, str, str, str]]:
    """(text, "found", "missed", "right" or "wrong", kind, what) of every label and every finding."""
    by_part = checkers()
    for entry in labelled:
        findings = by_part[entry.part].check(entry.text).findings
        for kind, start, end in entry.labels:
            covered = any(one.kind == kind and one.start <= start and one.end >= end for one in findings)
            yield entry, "found" if covered else "missed", kind, entry.text[start:end]
        for one in findings:
            right = any(one.start < end and start < one.end for _, start, end in entry.labels)
            yield entry, "right" if right else "wrong", one.kind, entry.text[one.start:one.end]


def scores(results: list[tuple[Labelled, str, str, str]]) -> dict[str, Any]:
    """Precision and recall with the counts they come from."""
    count = Counter(outcome for _, outcome, _, _ in results)
    return {"precision": _share(count["right"], count["wrong"]), "recall": _share(count["found"], count["missed"]),
            "findings": count["right"] + count["wrong"], "labels": count["found"] + count["missed"]}


def _share(good: int, bad: int) -> float | None:
    return round(good / (good + bad), 4) if good + bad else None


def measure() -> dict[str, Any]:
    """Precision and recall by split, part, group, language and kind."""
    labelled = texts()
    results = list(outcomes(labelled))
    report: dict[str, Any] = {"texts": len(labelled), "benign": sum(entry.group == "benign" for entry in labelled)}
    for split in ("tuning", "held-out"):
        inside = [result for result in results if result[0].split == split]
        report[split] = {"texts": sum(entry.split == split for entry in labelled), "all": scores(inside)}
        report[split]["pattern and pii"] = scores([result for result in inside if result[0].part != "secret"])
        for name in ("part", "group", "lang"):
            report[split] |= {value: scores([result for result in inside if getattr(result[0], name) == value])
                              for value in sorted({getattr(result[0], name) for result in inside})}
        report[split]["kinds"] = {kind: scores([result for result in inside if result[2] == kind])
                                  for kind in sorted({result[2] for result in inside})}
    return report


def megabytes() -> dict[str, str]:
    """Texts of 1 MB: prose, prose full of findings, Chinese, and some that are meant to be slow."""
    labelled = [entry.text for entry in texts()]
    rng = random.Random(3)
    benign = [entry.text for entry in texts() if entry.group == "benign"]
    prose = (
        "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. ",
        "在一个晴朗的早晨，我们沿着河边慢慢走回家。",
    )
    many = " ".join(rng.choice(labelled) for _ in range(40_000))
    return {
        name: _cut(text)
        for name, text in {
            "English prose": prose[0] * 14_000,
            "Chinese prose": prose[1] * 20_000,
            "look-alikes": " ".join(rng.choice(benign) for _ in range(40_000)),
            "the labelled texts": many,
            "digits": "1234567890" * 100_000,
            "spaced digits": "1 2 3 4 5 " * 100_000,
            "letters a": "a" * 1_000_000,
            "spaced letters": "p a s s " * 130_000,
            "at signs": "a@b." * 250_000,
            "card numbers": "4111111111111111 " * 60_000,
            "telephone numbers": "+1 415 555 2671, " * 60_000,
            "colons": "2001:db8:" * 120_000,
            "key names": "password: " * 100_000,
        }.items()
    }


def _cut(text: str) -> str:
    """As much of the text as 1 MB of UTF-8 holds."""
    return text.encode()[:1_000_000].decode("utf-8", "ignore")


def speed(repeats: int = 5) -> dict[str, float]:
    """Seconds to check 1 MB of each kind of text: the median."""
    checker, found = SafetyChecker(PATTERNS), {}
    checker.check("warm up: ann@mail.org, +1 415 555 2671, 4111 1111 1111 1111, ｐ")
    for name, text in megabytes().items():
        taken = []
        for _ in range(repeats):
            began = time.perf_counter()
            checker.check(text)
            taken.append(time.perf_counter() - began)
        found[name] = round(statistics.median(taken), 3)
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--misses", action="store_true", help="print what is wrong in the tuning half, and stop")
    if options.parse_args().misses:
        for entry, outcome, kind, what in outcomes([entry for entry in texts() if entry.split == "tuning"]):
            if outcome in ("missed", "wrong"):
                print(f"{outcome:<7}{kind:<14}{what!r}  in  {entry.text!r}")
        return
    result = {"machine": machine_facts()} | measure() | {"seconds for 1 MB": speed()}
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
