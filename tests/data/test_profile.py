"""The profile of training data, and drift against it, compared with what is counted by hand."""

import math
import random

import pytest

from gazelle.data.encode import Example
from gazelle.data.profile import RANKS, Drift, Profile, profile_of, stability_index


def row(prompt: list[int], answer: list[int]) -> Example:
    return Example([*prompt, *answer], [-100] * len(prompt) + answer, "row")


def test_the_index_by_hand() -> None:
    assert stability_index([50, 50], [25, 75]) == pytest.approx(0.25 * math.log(2) + 0.25 * math.log(1.5))
    assert stability_index([10, 30], [1, 3]) == 0
    assert stability_index([1, 0], [1, 1]) == pytest.approx(0.5 * math.log(2) + (0.5 - 1e-4) * math.log(0.5 / 1e-4))


def test_counts_are_those_of_each_answer() -> None:
    two_turns = Example([1, 2, 3, 4, 5, 6, 7], [-100, -100, 3, 4, -100, -100, 7], "row")
    profile = profile_of([two_turns])
    assert profile is not None
    # Answers of 2 and 1 tokens, behind 2 and 6 tokens; each decile ends at a length that is there.
    assert profile.edges == {"prompt_length": (2,), "answer_length": (1,)}
    assert profile.counts["prompt_length"] == (1, 1) and profile.counts["answer_length"] == (1, 1)
    assert profile.counts["prompt_tokens"] == (4, 0, 0, 0, 0) and profile.counts["answer_tokens"] == (3, 0, 0, 0, 0)
    assert set(profile.tokens) == {1, 2, 3, 4, 5, 6, 7}


def test_bins_hold_a_tenth_each_and_ranks_are_those_of_frequency() -> None:
    profile = profile_of([row([9, 9], [8] * length) for length in range(1, 101)]
                         + [row([9, 9], list(range(1000, 1040)))])
    assert profile is not None
    assert len(profile.edges["answer_length"]) == 9
    assert all(9 <= count <= 12 for count in profile.counts["answer_length"])
    assert profile.tokens[:2] == (8, 9)
    assert profile.counts["answer_tokens"][0] == 5050 + RANKS[0] - 2  # 8 and fourteen of the rare ones


def test_raw_text_has_no_prompts() -> None:
    profile = profile_of([Example([1, 2, 3], [-100, 2, 3], "text")])
    assert profile is not None and profile.counts.keys() == {"answer_length", "answer_tokens"}
    assert profile_of([]) is None


def test_a_profile_survives_a_file_and_a_wrong_one_is_told() -> None:
    profile = profile_of([row([1, 2], [3])])
    assert profile is not None and Profile.from_dict(profile.to_dict()) == profile
    whole = profile.to_dict()
    for wrong in ({}, whole | {"tokens": 3}, whole | {"counts": {"age": [1]}}, whole | {"edges": {}},
                  whole | {"counts": {"answer_length": [1]}}, whole | {"counts": {"answer_tokens": [0] * 5}},
                  whole | {"edges": {"answer_length": [2, 1], "prompt_length": [2]}}):
        with pytest.raises(ValueError, match="no profile"):
            Profile.from_dict(wrong)


def test_drift_tells_other_texts_from_the_same() -> None:
    draw = random.Random(3)

    def some(low: int, high: int) -> tuple[list[int], list[int]]:
        prompt = [min(int(draw.expovariate(0.01)), 5000) for _ in range(draw.randint(low, high))]
        return prompt, [7] * draw.randint(5, 9)

    profile = profile_of([row(*some(20, 60)) for _ in range(600)])
    assert profile is not None
    same, other = Drift(profile, window=400), Drift(profile, window=400)
    for _ in range(99):
        same.add(*some(20, 60))
    assert same.indices() == {}  # too few to say
    for _ in range(400):
        same.add(*some(20, 60))
        prompt, answer = some(60, 120)
        other.add([token + 20_000 for token in prompt], answer)
    assert max(same.indices().values()) < 0.1
    indices = other.indices()
    assert indices["prompt_length"] > 1 and indices["prompt_tokens"] > 1 and indices["answer_length"] < 0.1
