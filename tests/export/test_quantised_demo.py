"""The demo model in 4 bits knows more of what it was not calibrated with than after plain rounding."""

import pytest
from benchmarks.quantised import measure


@pytest.mark.slow
def test_perplexity_is_better_than_by_rounding_to_the_nearest(tmp_path):
    found = measure(tmp_path, rows=64)["perplexity"]
    print(found)
    assert found["gptq"] < found["nearest, symmetric"]
    assert found["awq"] < found["nearest, asymmetric"]
    assert found["fp8"] < 1.02 * found["float32"]
    assert found["float32"] < min(found["gptq"], found["awq"])
