"""Pieces add up to the whole, and hold no part of a stop string or of a character."""

import random

import pytest

from gazelle.generate.text import Pieces


def pieces_of(tokenizer, ids, stop=()):
    pieces = Pieces(tokenizer, stop)
    out = []
    for token in ids:
        out.append(pieces.add(token))
        if pieces.stopped:
            break
    out.append(pieces.end())
    assert "".join(out) == pieces.text
    return out


def test_a_character_of_several_tokens_comes_whole(demo_tokenizer):
    text = "a é 🙂 中文 👩‍👩‍👧 ok"
    ids = demo_tokenizer(text)["input_ids"]
    out = pieces_of(demo_tokenizer, ids)
    assert "".join(out) == text
    assert not any("\ufffd" in piece for piece in out)


def test_a_character_cut_off_at_the_end_is_shown_as_the_tokenizer_shows_it(demo_tokenizer):
    ids = demo_tokenizer("ab🙂")["input_ids"][:-1]
    assert "".join(pieces_of(demo_tokenizer, ids)) == demo_tokenizer.decode(ids)


def test_random_ids_add_up_to_what_they_decode_to(demo_tokenizer):
    draw = random.Random(0)
    for _ in range(30):
        ids = [draw.randrange(len(demo_tokenizer)) for _ in range(40)]
        assert "".join(pieces_of(demo_tokenizer, ids)) == demo_tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("stop", [("STOP",), ("xSTOP", "TOP"), ("ST", "Q"), ("P and",)])
def test_nothing_of_a_stop_string_is_handed_out(letters, stop):
    class Spelled:
        def decode(self, ids, **_):
            return "".join(map(chr, ids))

    text = "well SSTO and STxSTOP and more"
    want = text[:min(at for at in (text.find(word) for word in stop) if at >= 0)]
    out = pieces_of(Spelled(), [ord(letter) for letter in text], stop)
    assert "".join(out) == want


def test_what_was_held_back_comes_at_the_end():
    class Spelled:
        def decode(self, ids, **_):
            return "".join(map(chr, ids))

    assert pieces_of(Spelled(), [ord(letter) for letter in "so STO"], ("STOP",))[-1] == "STO"
