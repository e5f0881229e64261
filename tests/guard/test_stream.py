"""A text in pieces: whatever the pieces, what leaves is what `filter` makes of the whole."""

import random

import pytest
from benchmarks.guard import PATTERNS, texts

from gazelle import SafetyChecker
from gazelle.base.errors import OptionError
from gazelle.guard.checker import HOLD, REFUSAL
from gazelle.guard.findings import masked

FILLERS = [
    "Nothing to see here, move on. ",
    "今天天气很好，我们去公园玩吧。",
    "1 2 3 4 5 6 7 ",
    "x = f(a@b)\n",
    "\u200b\u200b ",
    "-- ",
    "4111 ",
]


def pieces(text, rng):
    position = 0
    while position < len(text):
        size = rng.choice((1, 1, 2, 3, 5, 8, 20, 60, 300))
        yield text[position:position + size]
        position += size


def streamed(checker, text, rng):
    stream = checker.stream()
    left = "".join(stream.feed(piece) for piece in pieces(text, rng))
    return stream, left, stream.finish()


@pytest.mark.parametrize("seed", range(8))
def test_any_split_gives_what_the_whole_gives(seed):
    rng = random.Random(seed)
    checker = SafetyChecker(PATTERNS if seed % 2 else ())
    labelled = [entry.text for entry in texts() if not (seed % 2 and entry.part == "pattern" and rng.random() < 0.9)]
    blocked = 0
    for _ in range(40):
        text = "".join(rng.choice(labelled) + rng.choice(("", " ", "\n")) if rng.random() < 0.5 else rng.choice(FILLERS)
                       for _ in range(rng.randint(1, 12)))
        verdict = checker.check(text)
        stream, left, rest = streamed(checker, text, rng)
        assert stream.verdict == verdict, text
        if verdict.allowed:
            assert left + rest == checker.filter(text), text
        else:
            blocked += 1
            first = min(found.start for found in verdict.findings if found.action == "block")
            assert rest == REFUSAL and masked(text, verdict.findings, 0, first).startswith(left), text
    assert blocked if seed % 2 else not blocked


def test_every_split_in_two_of_a_blocked_span():
    checker = SafetyChecker([r"(?i)credit card"])
    text = "well, " * 40 + "my C r e d i t  c a r d is here, " + "and so on. " * 40
    for position in range(230, 290):
        stream = checker.stream()
        left = stream.feed(text[:position]) + stream.feed(text[position:])
        assert (
            stream.blocked
            and text.startswith(left)
            and len(left) <= text.index("C r e d")
            and stream.finish() == REFUSAL
        )


def test_text_leaves_at_a_bounded_distance():
    stream, text = SafetyChecker(PATTERNS).stream(), "The quick brown fox jumps over the lazy dog, and so on. " * 40
    gone = 0
    for position, char in enumerate(text, 1):
        gone += len(stream.feed(char))
        assert position - gone <= HOLD + 40
    assert text[gone:] == stream.finish()


def test_a_long_key_waits_as_a_whole():
    body = "".join(random.Random(1).choice("abcdefghij0123456789+/") for _ in range(3000))
    key = f"-----BEGIN PRIVATE KEY-----\n{body}\n-----END PRIVATE KEY-----"
    stream, left, rest = streamed(SafetyChecker(), f"{'Here it is. ' * 30}{key} and more", random.Random(2))
    assert left + rest == "Here it is. " * 30 + "[PRIVATE_KEY] and more" and not stream.blocked


def test_nothing_leaves_before_the_classifier_has_spoken():
    checker = SafetyChecker(
        classifier=lambda texts: [{"label": "toxic", "score": float("bad" in text)} for text in texts]
    )
    stream = checker.stream()
    assert stream.feed("all is well " * 100) == "" and stream.feed("bad") == ""
    assert stream.finish() == REFUSAL and stream.blocked
    stream = checker.stream()
    assert (stream.feed("all is well " * 100), stream.finish()) == ("", "all is well " * 100)


def test_invisible_characters_do_not_push_text_out():
    stream = SafetyChecker(["password"]).stream()
    left = (
        stream.feed("so it goes " * 30 + "pass")
        + "".join(stream.feed("\u200b" * 50) for _ in range(100))
        + stream.feed("word. " + "so " * 99)
    )
    assert stream.blocked and "pass" not in left


def test_a_finished_stream_takes_no_more():
    stream = SafetyChecker().stream()
    assert (stream.feed("hello"), stream.finish(), stream.finish()) == ("", "hello", "")
    with pytest.raises(OptionError, match="finished"):
        stream.feed("more")


@pytest.mark.parametrize("gap", [50, 300, 900])
def test_patterns_that_match_long_texts(gap):
    """What tells them has to be within `hold_back` of their beginning."""
    text = "begin " + "and on " * (gap // 7) + "the end. " + "so be it. " * 60
    checker = SafetyChecker([r"(?s)begin.*the end"], hold_back=1000)
    stream, left, rest = streamed(checker, "well. " * 50 + text, random.Random(4))
    assert stream.blocked and rest == REFUSAL and "begin" not in left
    short = SafetyChecker([r"(?s)begin.*the end"])
    stream = short.stream()
    left = "".join(stream.feed(char) for char in "well. " * 50 + text)
    rest = stream.finish()
    assert not stream.verdict.allowed and rest == REFUSAL and ("begin" in left) == (gap > HOLD)


def test_what_a_stream_keeps_back_is_enough():
    with pytest.raises(OptionError, match="keep back more"):
        SafetyChecker(hold_back=10)


@pytest.mark.parametrize("lead", ["\u200b", "\u200b\u00ad\ufeff", "\u200b" * 300])
def test_what_cannot_be_seen_at_the_beginning_hides_nothing(lead):
    checker = SafetyChecker(block_patterns=["build a bomb"])
    stream = checker.stream()
    out = "".join(stream.feed(char) for char in lead + "build a bomb " + "and so on " * 40)
    assert stream.blocked and "build" not in out
    stream = checker.stream()
    text = lead + "ann@mail.org " + "and so on " * 40
    assert "".join(stream.feed(char) for char in text) + stream.finish() == checker.filter(text)
