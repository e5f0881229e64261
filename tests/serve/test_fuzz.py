"""schemathesis makes requests from the OpenAPI file, right ones and wrong ones: none is answered with 5xx.

It runs in a process of its own, since its plugin for pytest would change the whole suite.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from tests.serve.conftest import Running


def fuzz(running: Running, examples: int, phases: str, folder: Path, seed: int = 7) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run",
         f"{running.url}/openapi.json", "--checks", "not_a_server_error,response_schema_conformance",
         "--max-examples", str(examples), "--seed", str(seed), "--phases", phases,
         "--generation-database", "none", "--request-timeout", "120", "--suppress-health-check", "all", "--no-color"],
        cwd=folder, capture_output=True, text=True, timeout=600, check=False)  # it leaves files where it runs
    return done.stdout + done.stderr if done.returncode else ""


def answered(running: Running) -> dict[str, int]:
    found = re.findall(r'gazelle_requests_total\{.*status="(\d)\d\d"\} (\d+)', running.metrics())
    return {kind: sum(int(count) for one, count in found if one == kind) for kind in "2345"}


@pytest.mark.parametrize(("examples", "phases"), [
    (6, "fuzzing"), pytest.param(300, "examples,coverage,fuzzing", marks=pytest.mark.slow)])
def test_no_request_makes_the_server_fail(
    examples: int, phases: str, start: Callable[..., Running], tmp_path: Path
) -> None:
    running = start(max_context=64, seconds=120, queue=200)
    assert fuzz(running, examples, phases, tmp_path) == ""
    counts = answered(running)
    assert counts["5"] == 0 and counts["4"] > 2 * examples and counts["2"] > examples
    assert httpx.get(f"{running.url}/health").status_code == 200


def test_the_openapi_file_describes_the_whole_api(server: Running) -> None:
    described = httpx.get(f"{server.url}/openapi.json").json()
    assert set(described["paths"]) == {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{name}",
                                       "/v1/feedback", "/health", "/metrics"}
    chat = described["paths"]["/v1/chat/completions"]["post"]
    assert {"200", "400", "401", "429", "503"} <= chat["responses"].keys() and chat["security"]
