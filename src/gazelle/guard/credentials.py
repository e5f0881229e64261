"""Keys and secrets: the forms that services give them, and values that somebody assigned to a telling name."""

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Iterator

from gazelle.guard.detector import Candidate, Detector, Span

# kind -> form. Prefixes are those that the services document for secret scanners.
_FORMS = {
    "aws_key": r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}",
    "github_token": r"gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}",
    "gitlab_token": r"gl(?:pat|dt|rt|cbt)-[A-Za-z0-9_\-]{20,64}",
    "anthropic_key": r"sk-ant-[a-z0-9]{3,8}-[A-Za-z0-9_\-]{40,200}",
    "openai_key": r"sk-(?:proj|svcacct|admin|None)-[A-Za-z0-9_\-]{32,200}|sk-[A-Za-z0-9]{32,64}",
    "huggingface_token": r"hf_[A-Za-z0-9]{34,40}|api_org_[A-Za-z0-9]{34}",
    "slack_token": r"xox[abeoprs]-[A-Za-z0-9\-]{10,250}|xapp-[0-9]-[A-Za-z0-9\-]{20,200}",
    "slack_webhook": r"hooks\.slack\.com/services/T[A-Z0-9]{6,12}/B[A-Z0-9]{6,12}/[A-Za-z0-9]{16,32}",
    "stripe_key": r"(?:sk|rk)_(?:live|test)_[A-Za-z0-9]{16,200}|whsec_[A-Za-z0-9+/=]{24,64}",
    "google_key": r"AIza[A-Za-z0-9_\-]{35}|GOCSPX-[A-Za-z0-9_\-]{28}|ya29\.[A-Za-z0-9_\-]{30,250}",
    "npm_token": r"npm_[A-Za-z0-9]{36}",
    "pypi_token": r"pypi-AgE[A-Za-z0-9_\-]{50,250}",
    "sendgrid_key": r"SG\.[A-Za-z0-9_\-]{22}\.[A-Za-z0-9_\-]{43}",
    "telegram_token": r"[0-9]{8,10}:AA[A-Za-z0-9_\-]{33}",
    "aliyun_key": r"LTAI[A-Za-z0-9]{12,20}",
    "tencent_key": r"AKID[A-Za-z0-9]{32}",
    "digitalocean_token": r"do[opr]_v1_[a-f0-9]{64}",
}
_REASONS = {kind: f"a credential in the form of {kind.replace('_', ' ')}s" for kind in _FORMS}


def _form(candidate: Candidate) -> Iterator[tuple[str, Span]]:
    kind = next(kind for kind, found in zip(_FORMS, candidate.groups[1:], strict=True) if found is not None)
    body = candidate.found[6:]
    # "sk-xxxxxxxx…" in a manual is no key, and neither is the name of a model or a style sheet.
    if candidate.alone("_") and len(set(body)) >= 8 and any(char.isdigit() or char.isupper() for char in body):
        yield kind, (candidate.start, candidate.end, 1.0)


def _jwt(candidate: Candidate) -> Iterator[tuple[str, Span]]:
    header = candidate.found.partition(".")[0]
    try:
        decoded = json.loads(base64.urlsafe_b64decode(header + "=" * (-len(header) % 4)))
    except (ValueError, RecursionError):
        return
    if isinstance(decoded, dict) and "alg" in decoded and candidate.alone():
        yield "jwt", (candidate.start, candidate.end, 1.0)


_PLACEHOLDER = re.compile(r"(?i)your|example|placeholder|changeme|change_me|dummy|xxxx|\*\*\*|\.\.\.|…|<|>|\$\{|\{\{|%\(|none$|null$|true$|"
                          r"false$|redacted|required|optional|secret$|password$|string$|undefined|getenv|config\.|input|"
                          r"process\.|environ|self\.|args\.|settings|token$|_here|insert|foobar|masked|hidden|请|你的|您的")


def entropy(text: str) -> float:
    """Bits a character, by how often each occurs in `text`."""
    return -sum(count / len(text) * math.log2(count / len(text)) for count in Counter(text).values())


def _assigned(candidate: Candidate) -> Iterator[tuple[str, Span]]:
    name, value = (candidate.groups[1] or "").lower(), candidate.groups[2] or ""
    start, end = candidate.spans[2]
    kept = value.rstrip(".,;:?)'\"")
    end -= len(value) - len(kept)
    value = kept
    if _PLACEHOLDER.search(value) or "(" in value or "://" in value or len(set(value)) < 5:
        return
    letters, digits = any(char.isalpha() for char in value), any(char.isdigit() for char in value)
    signs = any(not char.isalnum() for char in value)
    if re.search(r"pass|pwd|密码|口令|passphrase", name):
        if len(value) >= 6 and letters and (digits or signs and re.search(r"[!@#$%^&*+=~]", value)):
            yield "password", (start, end, 0.9)
    elif len(value) >= 16 and letters and digits and entropy(value) >= 3.0 and re.fullmatch(r"[A-Za-z0-9+/=_.\-]+", value):
        yield "secret", (start, end, 0.9)


_NAME = (r"api[_ -]?key|secret[_ -]?key|access[_ -]?key|access[_ -]?key[_ -]?secret|client[_ -]?secret|auth[_ -]?token|access[_ -]?token|"
         r"secret[_ -]?access[_ -]?key|refresh[_ -]?token|api[_ -]?token|bearer|token|secret|app[_ -]?secret|private[_ -]?key|encryption[_ -]?key|"
         r"account[_ -]?key|signing[_ -]?key|password|passwd|passphrase|pass|pwd|密码|口令|密钥|令牌")
_LINK = r"[\"'`]?[ \t]{0,3}(?::=|=>|=|:|\bis(?: now| still)?\b|\bwas\b|是|为|改成|设为| )[ \t]{0,3}[\"'`]?"


def _url(candidate: Candidate) -> Iterator[tuple[str, Span]]:
    start, end = candidate.spans[1]
    password = candidate.groups[1] or ""
    if not _PLACEHOLDER.search(password) and password.lower() not in ("password", "pass", "pwd", "secret", "user"):
        yield "url_password", (start, end, 0.95)


CREDENTIALS = (
    Detector("secret", _REASONS, r"\b(?:" + "|".join(f"({form})" for form in _FORMS.values()) + ")", _form),
    Detector("secret", {"jwt": "a signed web token: its header is one"},
             r"\beyJ[A-Za-z0-9_\-]{8,400}\.[A-Za-z0-9_\-]{8,}(?:\.[A-Za-z0-9_\-]*)?", _jwt),
    Detector("secret", {"private_key": "a private key"},
             r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----(?:\\n|\s)*(?:[A-Za-z\-]{1,20}: [^\n]{1,80}\n)*"
             r"(?:\\n|\s)*[A-Za-z0-9+/=]{16}[A-Za-z0-9+/=\\\s]*(?:-----END [A-Z0-9 ]{0,40}-----)?"),
    Detector("secret", {"password": "a password, told after the word", "secret": "a random value assigned to the name of a secret"},
             rf"(?i)({_NAME}){_LINK}([!#-&(-+\-./0-:=?-_a-~]{{6,200}})", _assigned),
    Detector("secret", {"url_password": "a password in a URL"},
             r"[a-z][a-z0-9+.\-]{1,20}://[^\s:/@\"'<>]{1,80}:([^\s/@\"'<>]{1,100})@", _url, ("://",)),
)
