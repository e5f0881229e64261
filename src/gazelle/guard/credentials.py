"""Keys and secrets: the forms that services give them, and values that somebody assigned to a telling name."""

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Iterator

from gazelle.guard.detector import Candidate, Detector, Span

_WORD = "[A-Za-z0-9_\\-]"
# (kind, how it begins, how it goes on). The beginnings are those that the services document for secret scanners.
_FORMS = (
    ("aws_key", "A(?:KIA|SIA|BIA|CCA)", r"[A-Z2-7]{16}"),
    ("github_token", "gh[pousr]_", r"[A-Za-z0-9]{36,255}"),
    ("github_token", "github_pat_", r"[A-Za-z0-9]{22}_[A-Za-z0-9]{59}"),
    ("gitlab_token", "gl(?:pat|dt|rt|cbt)-", rf"{_WORD}{{20,64}}"),
    ("anthropic_key", "sk-ant-", rf"[a-z0-9]{{3,8}}-{_WORD}{{40,200}}"),
    ("openai_key", "sk-(?:proj|svcacct|admin|None)-", rf"{_WORD}{{32,200}}"),
    ("openai_key", "sk-", r"[A-Za-z0-9]{32,64}"),
    ("huggingface_token", "hf_|api_org_", r"[A-Za-z0-9]{34,40}"),
    ("slack_token", "xox[abeoprs]-|xapp-", r"[A-Za-z0-9\-]{20,250}"),
    ("slack_webhook", r"hooks\.slack\.com/services/", r"T[A-Z0-9]{6,12}/B[A-Z0-9]{6,12}/[A-Za-z0-9]{16,32}"),
    ("stripe_key", "[sr]k_(?:live|test)_", r"[A-Za-z0-9]{16,200}"),
    ("google_key", "AIza", rf"{_WORD}{{35}}"),
    ("npm_token", "npm_", r"[A-Za-z0-9]{36}"),
    ("pypi_token", "pypi-AgE", rf"{_WORD}{{50,250}}"),
    ("sendgrid_key", r"SG\.", rf"{_WORD}{{22}}\.{_WORD}{{43}}"),
    ("telegram_token", r"[0-9]{8,10}:AA", rf"{_WORD}{{33}}"),
    ("aliyun_key", "LTAI", r"[A-Za-z0-9]{12,20}"),
    ("tencent_key", "AKID", r"[A-Za-z0-9]{32}"),
    ("digitalocean_token", "do[opr]_v1_", r"[a-f0-9]{64}"),
)
_REASONS = {kind: f"a credential in the form of {kind.replace('_', ' ')}s" for kind, _, _ in _FORMS}
_WHOLE = [(kind, re.compile(f"(?:{begin})({rest})")) for kind, begin, rest in _FORMS]


def _form(candidate: Candidate) -> Iterator[tuple[str, Span]]:
    for kind, form in _WHOLE:
        if (found := form.match(candidate.text, candidate.start)) is None:
            continue
        after = candidate.text[found.end():found.end() + 1]
        # "sk-xxxxxxxx…" in a manual is no key.
        if not (after.isascii() and (after.isalnum() or after == "_")) and len(set(found[1])) >= 8:
            yield kind, (*found.span(), 1.0)
            return


def _jwt(candidate: Candidate) -> Iterator[tuple[str, Span]]:
    header = candidate.found.partition(".")[0]
    try:
        decoded = json.loads(base64.urlsafe_b64decode(header + "=" * (-len(header) % 4)))
    except (ValueError, RecursionError):
        return
    if isinstance(decoded, dict) and "alg" in decoded and candidate.alone():
        yield "jwt", (candidate.start, candidate.end, 1.0)


_PLACEHOLDER = re.compile(
    r"(?i)your|example|placeholder|changeme|change_me|dummy|xxxx|\*\*\*|\.\.\.|…|<|>|\$\{|\{\{|%\(|none$|null$|true$|"
    r"false$|redacted|required|optional|secret$|password$|string$|undefined|getenv|config\.|input|"
    r"process\.|environ|self\.|args\.|settings|token$|_here|insert|foobar|masked|hidden|请|你的|您的"
)


def entropy(text: str) -> float:
    """Bits a character, by how often each occurs in `text`."""
    return -sum(count / len(text) * math.log2(count / len(text)) for count in Counter(text).values())


def _assigned(candidate: Candidate) -> Iterator[tuple[str, Span]]:
    name, value = candidate.match.group(1).lower(), candidate.match.group(2)
    start, end = candidate.match.span(2)
    kept = value.rstrip(".,;:?)'\"")
    end -= len(value) - len(kept)
    value = kept
    if _PLACEHOLDER.search(value) or "(" in value or "://" in value or len(set(value)) < 5:
        return
    letters, digits = any(char.isalpha() for char in value), any(char.isdigit() for char in value)
    signs = any(not char.isalnum() for char in value)
    if re.search(r"pass|pwd|密码|口令|passphrase", name):
        if len(value) >= 6 and letters and (digits or (signs and re.search(r"[!@#$%^&*+=~]", value))):
            yield "password", (start, end, 0.9)
    elif (
        len(value) >= 16
        and letters
        and digits
        and entropy(value) >= 3.0
        and re.fullmatch(r"[A-Za-z0-9+/=_.\-]+", value)
    ):
        yield "secret", (start, end, 0.9)


_NAME = (
    r"(?:api|secret|access|private|encryption|account|signing)[_ -]?key|access[_ -]?key[_ -]?secret|bearer|token|"
    r"secret|password|passwd|passphrase|pass|pwd|密码|口令|密钥|令牌"
)
_LINK = r"[\"'`]?[ \t]{0,3}(?::=|=>|=|:|\bis(?: now| still)?\b|\bwas\b|是|为|改成|设为| )[ \t]{0,3}[\"'`]?"


def _url(candidate: Candidate) -> Iterator[tuple[str, Span]]:
    start, end = candidate.match.span(1)
    password = candidate.match.group(1)
    if not _PLACEHOLDER.search(password) and password.lower() not in ("password", "pass", "pwd", "secret", "user"):
        yield "url_password", (start, end, 0.95)


CREDENTIALS = (
    Detector(
        "secret", _REASONS, r"\b(?:" + "|".join(begin for _, begin, _ in _FORMS) + r")[A-Za-z0-9_\-.]", _form
    ),
    Detector(
        "secret",
        {"jwt": "a signed web token: its header is one"},
        r"\beyJ[A-Za-z0-9_\-]{8,400}\.[A-Za-z0-9_\-]{8,}(?:\.[A-Za-z0-9_\-]*)?",
        _jwt,
        ("eyJ",),
    ),
    Detector(
        "secret",
        {"private_key": "a private key"},
        r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----(?:\\n|\s)*(?:[A-Za-z\-]{1,20}: [^\n]{1,80}\n)*"
        r"(?:\\n|\s)*[A-Za-z0-9+/=]{16}[A-Za-z0-9+/=\\\s]*(?:-----END [A-Z0-9 ]{0,40}-----)?",
        needs=("PRIVATE KEY",),
    ),
    Detector(
        "secret",
        {"password": "a password, told after the word", "secret": "a random value assigned to the name of a secret"},
        rf"(?i)({_NAME}){_LINK}([!#-&(-+\-./0-:=?-_a-~]{{6,200}})",
        _assigned,
        spelt=True,
    ),
    Detector(
        "secret",
        {"url_password": "a password in a URL"},
        r"[a-z][a-z0-9+.\-]{1,20}://[^\s:/@\"'<>]{1,80}:([^\s/@\"'<>]{1,100})@",
        _url,
        ("://",),
    ),
)
