"""SafetyChecker as people call it: what is blocked, what is masked, what is refused at construction."""

import json
import time
from pathlib import Path

import pytest

from gazelle import SafetyChecker
from gazelle.base.errors import MissingDependencyError, OptionError
from gazelle.guard.checker import KINDS, REFUSAL
from gazelle.guard.patterns import MATCHES

ARTICLE = [r"(?i)(password|credit card|ssn)"]


def test_the_call_of_the_articles():
    checker = SafetyChecker(block_patterns=ARTICLE, max_reject_score=0.8)
    assert checker.filter("The sky is blue.") == "The sky is blue."
    assert checker.filter("Your PassWord is on the note.") == REFUSAL
    assert checker.filter("Write to ann.lee@mail.org or +1 415 555 2671.") == "Write to [EMAIL] or [PHONE]."
    verdict = checker.check("His SSN, please: ann@mail.org")
    assert not verdict.allowed and verdict.score == 1
    assert [(found.kind, found.start, found.end, found.action) for found in verdict.findings] == [
        ("pattern", 4, 7, "block"), ("email", 17, 29, "mask")]
    assert verdict.reasons[0] == "block_patterns[0] matches"


def test_a_verdict_holds_none_of_the_text():
    secret = "sk-proj-" + "aZ3kQ9xW" * 8
    verdict = SafetyChecker().check(f"key {secret} of ann@mail.org")
    written = json.dumps(verdict.to_dict()) + repr(verdict)
    assert verdict.kinds == ("openai_key", "email")
    assert "aZ3k" not in written and "ann@" not in written


@pytest.mark.parametrize(("action", "allowed", "text"), [
    ("mask", True, "to [EMAIL]"), ("block", False, REFUSAL), ("report", True, "to ann@mail.org"),
    ("off", True, "to ann@mail.org"),
])
def test_actions(action, allowed, text):
    checker = SafetyChecker(pii=action)
    verdict = checker.check("to ann@mail.org")
    assert verdict.allowed is allowed and bool(verdict.findings) == (action != "off")
    assert checker.filter("to ann@mail.org") == text


def test_patterns_can_mask_too():
    assert SafetyChecker(["Project [A-Z]+"], on_pattern="mask").filter("on Project ZEUS now") == "on [PATTERN] now"


@pytest.mark.parametrize(
    ("original", "found"),
    [
        ("my pаsswоrd now", "pаsswоrd"),
        ("my ｐａｓｓｗｏｒｄ now", "ｐａｓｓｗｏｒｄ"),
        ("my p\u200bass\u2060word now", "p\u200bass\u2060word"),
        ("my p.a.s.s.w.o.r.d now", "p.a.s.s.w.o.r.d"),
        ("my P@$$w0rd now", "P@$$w0rd"),
        ("my p\u0336a\u0336ssword\u0336 now", "p\u0336a\u0336ssword\u0336"),
        ("😀 my \U0001d429assword", "\U0001d429assword"),
        ("my pass\u202eword\u202c!", "pass\u202eword\u202c"),
    ],
)
def test_spans_are_those_of_the_text_as_it_was_given(original, found):
    (finding,) = SafetyChecker(ARTICLE).check(original).findings
    assert original[finding.start:finding.end] == found


def test_scores_and_the_limit():
    likely, proved = "call (415) 555-2671", "card 4111 1111 1111 1111"
    assert [found.score for found in SafetyChecker().check(f"{likely}; {proved}").findings] == [0.9, 1.0]
    strict = SafetyChecker(max_reject_score=0.95)
    assert strict.filter(likely) == likely and strict.filter(proved) == "card [CARD]"
    assert SafetyChecker(ARTICLE, max_reject_score=1).filter("password") == REFUSAL


def test_kinds_are_chosen():
    checker = SafetyChecker(kinds=["iban"])
    assert checker.filter("ann@mail.org, DE89 3704 0044 0532 0130 00") == "ann@mail.org, [IBAN]"
    assert {"card", "email", "phone", "cn_id"} <= set(KINDS["pii"]) and "jwt" in KINDS["secret"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"block_patterns": r"(?i)password"}, "in brackets"),
        ({"block_patterns": [3]}, "a pattern is not a text"),
        ({"block_patterns": [r"ok", r"(?<=a)b"]}, "block_patterns[1]"),
        ({"block_patterns": [r"(a)\1"]}, "invalid escape sequence"),
        ({"block_patterns": [r"a(?=b)"]}, "no look-ahead"),
        ({"block_patterns": [r"(unclosed"]}, "missing )"),
        ({"block_patterns": [r"x*"]}, "found everywhere"),
        ({"block_patterns": ["\ud800"]}, "cannot be used"),
        ({"max_reject_score": 1.5}, "0 to 1"),
        ({"max_reject_score": "high"}, "0 to 1"),
        ({"pii": "hide"}, "mask"),
        ({"kinds": ["emial"]}, "did you mean 'email'"),
        ({"labels": ["toxic"]}, "labels without a classifier"),
    ],
)
def test_what_cannot_be_used_is_refused_at_once(options, said):
    with pytest.raises(OptionError) as caught:
        SafetyChecker(**options)
    assert said in str(caught.value)


def test_only_text_is_checked():
    with pytest.raises(OptionError, match="only text"):
        SafetyChecker().check(b"bytes")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "re2", None)
    with pytest.raises(MissingDependencyError, match="google-re2") as caught:
        SafetyChecker(["a"])
    assert "pip install gazelle[guard]" in str(caught.value)


def test_configuration(tmp_path: Path):
    file = tmp_path / "guard.yaml"
    file.write_text("block_patterns: ['(?i)zeus']\nsecrets: block\nkinds: [email, aws_key]\n")
    checker = SafetyChecker.from_config(file)
    assert checker.filter("Zeus") == REFUSAL and checker.filter("a@b.org, 4111 1111 1111 1111").startswith(
        "[EMAIL], 4111"
    )
    assert checker.filter("AKIA" + "QWERTYUIOPASDFGH") == REFUSAL
    assert SafetyChecker.from_config({"block_patterns": ["zeus"]}).filter("zeus") == REFUSAL
    with pytest.raises(OptionError, match="unknown option") as caught:
        SafetyChecker.from_config({"block_pattern": []})
    assert "did you mean 'block_patterns'" in str(caught.value)
    file.write_text("block_patterns: [\n")
    with pytest.raises(OptionError, match="not valid YAML"):
        SafetyChecker.from_config(file)
    file.write_text("- a\n")
    with pytest.raises(OptionError, match="no options"):
        SafetyChecker.from_config(str(file))
    with pytest.raises(OptionError, match="no such file"):
        SafetyChecker.from_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "pattern", [r"(a+)+$", r"(a|aa)+$", r"(.*a){12}x", r"^(([a-z])+.)+[A-Z]([a-z])+$", r"a[^b]*b|a", r"(x+x+)+y"]
)
def test_a_pathological_pattern_cannot_stall_it(pattern):
    """Python's own engine takes longer than the age of the universe on most of these. The last but one looks to the end
    of the text for each of its matches: after so many, the rest counts as matched."""
    checker = SafetyChecker([pattern], pii="off", secrets="off")
    began = time.perf_counter()
    for text in ("a" * 100_000 + "!", "x" * 100_000, "aB" * 50_000):
        checker.check(text)
    assert time.perf_counter() - began < 15  # on a crowded machine; alone it is a tenth of that


def test_after_many_matches_the_rest_counts_as_matched():
    findings = SafetyChecker(["a"], on_pattern="mask").check("a" + " a" * (2 * MATCHES)).findings
    assert len(findings) == MATCHES and findings[-1].end == 4 * MATCHES + 1


def test_half_characters_and_odd_texts():
    checker = SafetyChecker(ARTICLE)
    for text in ("", "\ud800 password \udfff", "\x00password", "\u200b" * 50, "a\u0301" * 50, "𝟜" * 30):
        assert checker.check(text).allowed is ("password" not in text)
