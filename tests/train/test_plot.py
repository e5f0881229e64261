"""Curves say what they show."""

import re

from gazelle.train.plot import panel_svgs


def test_a_lone_evaluation_is_named_and_stands_at_a_whole_step() -> None:
    svg, = panel_svgs([{"step": 4, "eval_loss": 3.7}])
    words = re.findall(r">([^<>]+)</text>", svg)
    assert "evaluation" in words
    assert "4" in words[: words.index("optimizer step")]
    assert not any(re.fullmatch(r"[34]\.\d\d", word) for word in words[: words.index("optimizer step")])
