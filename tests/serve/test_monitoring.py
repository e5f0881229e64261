"""The dashboard and the alerts ask for metrics that exist, with labels that they have."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families
from tests.serve.conftest import Reference, Running, eventually

from gazelle.__main__ import main
from gazelle.data.encode import Example
from gazelle.data.profile import Drift, profile_of
from gazelle.serve.metrics import OTHER, ServerMetrics, Told
from gazelle.serve.monitoring import FILES
from gazelle.train.telemetry import Telemetry

ALWAYS = {"instance", "job", "le"}
WORDS = {"sum", "by", "rate", "histogram_quantile", "increase", "count", "ignoring", "min_over_time", "changes", "and"}


class Idle:
    running = waiting = cached_tokens = 0


def existing() -> dict[str, set[str]]:
    """Every series of a server and of a run, with its labels, as they are declared."""
    registry = CollectorRegistry()
    Telemetry(registry)
    found: dict[str, set[str]] = {}
    for held in (registry, ServerMetrics(["base"], ["alice"], Idle()).registry):
        for collector in list(held._collector_to_names):
            declared = [(collector._name, collector._type, collector._labelnames)] \
                if isinstance(collector, MetricWrapperBase) else \
                [(family.name, family.type, family._labelnames) for family in collector.collect()]
            for name, kind, labels in declared:
                ends = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(kind, [""])
                found |= {name + end: set(labels) for end in ends}
    return found


def expressions(folder: Path) -> Iterator[tuple[str, str]]:
    """(expression, what is shown of its labels) of every panel and rule."""
    board = json.loads((folder / "grafana.json").read_text())
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"], target["legendFormat"]
    for group in yaml.safe_load((folder / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["expr"], " ".join(rule["annotations"].values())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("monitoring") / "new"
    assert main(["serve", "--dashboard", str(folder)]) == 0
    return folder


def complaints(expression: str, shown: str, metrics: dict[str, set[str]]) -> list[str]:
    names = re.findall(r"\bgazelle_\w+", expression)
    found = [f"no metric {name}" for name in names if name not in metrics]
    labels = set().union(ALWAYS, *(metrics.get(name, set()) for name in names))
    for name, chosen in re.findall(r"(gazelle_\w+)\{([^}]*)\}", expression):
        found += [f"{name} has no label {label}" for label in re.findall(r"(\w+)\s*[=!]~?", chosen)
                  if label not in metrics.get(name, set())]
    for inside in re.findall(r"(?:by|ignoring)\s*\(([^)]*)\)", expression):
        found += [f"no label {label.strip()}" for label in inside.split(",") if label.strip() not in labels]
    kept = re.search(r"by\s*\(([^)]*)\)", expression)
    visible = {label.strip() for label in kept[1].split(",")} if kept else labels
    found += [f"{label} is not there to be shown" for label in re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}", shown)
              if label not in visible]
    words = re.findall(r"[a-z_]\w*(?=\s*\()", re.sub(r"\{[^}]*\}", "", expression))
    return found + [f"unknown function {word}" for word in words if word not in WORDS]


def test_every_expression_asks_for_what_there_is(written: Path) -> None:
    metrics, asked = existing(), set()
    for expression, shown in expressions(written):
        assert complaints(expression, shown, metrics) == [], expression
        asked |= set(re.findall(r"gazelle_\w+", expression))
    unseen = {name for name in metrics if not any(one.startswith(re.sub("_(bucket|sum|count|total)$", "", name))
                                                 for one in asked)}
    assert unseen == set(), "these are on no panel"
    assert len(list(expressions(written))) > 40 and {path.name for path in written.iterdir()} == set(FILES)


@pytest.mark.parametrize(("expression", "shown"), [
    ("gazelle_lattency", ""), ("rate(gazelle_answers[5m])", ""), ('gazelle_requests_total{code="500"}', ""),
    ("sum by (user) (gazelle_feedback_total)", ""), ("sum by (model) (gazelle_feedback_total)", "{{rating}}"),
    ("sums(gazelle_drift_index)", ""),
])
def test_the_check_itself_notices(expression: str, shown: str) -> None:
    assert len(complaints(expression, shown, existing())) >= 1


def test_the_board_is_one_that_grafana_takes(written: Path) -> None:
    board = json.loads((written / "grafana.json").read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids) and board["schemaVersion"]
    assert board["templating"]["list"][0]["type"] == "datasource"
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places)
    rows = [panel["title"] for panel in board["panels"] if panel["type"] == "row"]
    assert rows == ["Resources", "Quality", "Business", "Training"]


def values(running: Running) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(running.metrics())
    return {(sample.name, frozenset(sample.labels.items())): sample.value
            for family in families for sample in family.samples}


def test_what_is_counted_is_what_happened(start: Callable[..., Running], reference: Reference) -> None:
    running = start()
    ids = reference.tokenizer("the quick brown")["input_ids"]
    ask = {"model": "red", "prompt": "the quick brown", "max_tokens": 7, "temperature": 0, "n": 2}
    with httpx.Client(base_url=running.url) as client:
        for _ in range(3):
            assert client.post("/v1/completions", json=ask).status_code == 200
        assert client.post("/v1/completions", json=ask | {"model": "x" * 50}).status_code == 404
        client.get("/v1/" + "x" * 50)
    eventually(lambda: running.service.worker.batcher.running == 0)
    found = values(running)

    def value(name: str, **labels: str) -> float:
        return found[name, frozenset(labels.items())]

    written = len(reference.answer("red", ids, 7))
    assert value("gazelle_requests_total", path="/v1/completions", model="red", status="200") == 3
    assert value("gazelle_requests_total", path="/v1/completions", model=OTHER, status="404") == 1
    assert value("gazelle_requests_total", path=OTHER, model=OTHER, status="404") == 1
    assert value("gazelle_answer_tokens_sum", model="red") == 6 * written
    assert value("gazelle_prompt_tokens_sum", model="red") == 6 * len(ids)
    assert value("gazelle_key_tokens_total", key="anonymous", kind="answer") == 6 * written
    assert value("gazelle_key_tokens_total", key="anonymous", kind="prompt") == 3 * len(ids)  # as usage says
    assert value("gazelle_first_token_seconds_count", model="red") == 6
    assert value("gazelle_inter_token_seconds_count", model="red") == 6
    assert value("gazelle_request_seconds_count", path="/v1/completions") == 4
    assert 0 < value("gazelle_inter_token_seconds_sum", model="red") \
        < value("gazelle_request_seconds_sum", path="/v1/completions")
    assert value("gazelle_host_memory_bytes", kind="total") > value("gazelle_host_memory_bytes", kind="available") > 0
    assert value("gazelle_running_answers") == 0 and value("gazelle_queue_answers") == 0


def test_no_client_makes_new_series(start: Callable[..., Running]) -> None:
    running = start()
    with httpx.Client(base_url=running.url) as client:
        def strange(number: int) -> None:
            client.get(f"/v1/{number}")
            client.post("/v1/completions", json={"model": f"m{number}", "prompt": "a", "user": f"u{number}"})
            client.request(f"VERB{number}", "/health")

        strange(0)
        running.metrics()  # which is a request, too
        before = len(values(running))
        for number in range(1, 8):
            strange(number)
    assert len(values(running)) == before


def test_drift_and_declining_are_seen(reference: Reference) -> None:
    row = Example([1] * 20 + [2] * 8, [-100] * 20 + [2] * 8, "row")
    profile = profile_of([row] * 10 + [Example([1] * 25 + [2] * 9, [-100] * 25 + [2] * 9, "row")] * 10)
    assert profile is not None
    metrics = ServerMetrics(["base", "red"], [], Idle(), {"base": Drift(profile, least=5)})

    def told(model: str, text: str, prompt: list[int], finish: str = "stop") -> None:
        metrics.answer(Told(model, "anonymous", prompt, [2] * 8, text, finish))

    for number in range(6):
        text = "I'm sorry, but I can't help with that." if number % 2 else "Sorry seems to be the hardest word."
        told("base", text, [9] * 60)
    told("red", "抱歉,我无法回答。", [1])
    told("red", "I am sorry", [1], finish="cancelled")
    found = {(sample.name, *sample.labels.values()): sample.value
             for family in text_string_to_metric_families(metrics.text().decode()) for sample in family.samples}
    assert found["gazelle_declined_answers_total", "base"] == 3 and found["gazelle_declined_answers_total", "red"] == 1
    assert found["gazelle_drift_index", "base", "prompt_length"] > 0.25
    assert found["gazelle_drift_index", "base", "prompt_tokens"] > 0.25
    assert not [key for key in found if key[0] == "gazelle_drift_index" and key[1] == "red"]


def test_gpus_are_read_where_torch_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers are torch's; here it is asked in place of a GPU what would be told."""
    import torch

    from gazelle.base.metrics import Resources

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10 + index, 100))
    monkeypatch.setattr(torch.cuda, "utilization", lambda index: 25 + index)
    samples: dict[tuple[Any, ...], float] = {(sample.name, *sample.labels.values()): sample.value
                                             for family in Resources().collect() for sample in family.samples}
    assert samples["gazelle_gpu_memory_bytes", "1", "used"] == 89
    assert samples["gazelle_gpu_memory_bytes", "0", "total"] == 100
    assert samples["gazelle_gpu_utilization_ratio", "1"] == 0.26


def test_a_gpu_that_nvml_says_nothing_of_hides_no_other_metric(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A part of a GPU (MIG) has no utilisation, and a container may have no NVML."""
    import pynvml
    import torch

    from gazelle.base.metrics import Resources

    def silent(index: int) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED) if index else RuntimeError("no driver")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10, 100))
    monkeypatch.setattr(torch.cuda, "utilization", silent)
    resources = Resources()
    for _ in range(2):
        names = [sample.name for family in resources.collect() for sample in family.samples]
        assert names.count("gazelle_gpu_memory_bytes") == 4 and "gazelle_gpu_utilization_ratio" not in names
    assert [record.getMessage()[:16] for record in caplog.records] == ["The use of GPU 0", "The use of GPU 1"]
