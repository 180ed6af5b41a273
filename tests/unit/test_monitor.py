"""The port for metrics and health, and the names that it shows."""

from __future__ import annotations

import re
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from celery_kafka_backend import metrics
from celery_kafka_backend.errors import SettingsError
from celery_kafka_backend.metrics import Metric
from celery_kafka_backend.monitor import Endpoint, Series

NAMES = ("the address", "the port")
DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


class Source:
    metrics = (
        Metric("t_events_total", "counter", "Events.", ("view",)),
        Metric("t_seconds", "histogram", "Time.", buckets=(0.5, 1.0)),
        Metric("t_lag", "gauge", "Lag."),
    )

    def __init__(self):
        self.wrong: list[str] = []

    def series(self):
        yield Series(self.metrics[0], ("redis-1",), [3.0])
        yield Series(self.metrics[1], (), [1.0, 2.0, 4.0, 12.5])

    def unhealthy(self):
        return []

    def unready(self):
        return self.wrong


@pytest.fixture(scope="module")
def endpoint():
    """One for all: to close it takes half a second."""
    found = Endpoint(Source(), "127.0.0.1", 0, NAMES)
    found.start()
    yield found
    found.close()


@pytest.fixture
def served(endpoint):
    endpoint._source.wrong = []
    return endpoint._source, endpoint.url


def get(url, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_prometheus_reads_what_is_served(served):
    _, url = served
    status, text = get(f"{url}/metrics")
    assert status == 200
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert set(families) == {"t_events", "t_seconds", "t_lag"}
    samples = {(s.name, *sorted(s.labels.items())): s.value for family in families.values() for s in family.samples}
    assert samples == {
        ("t_events_total", ("view", "redis-1")): 3.0,
        ("t_seconds_bucket", ("le", "0.5")): 1.0,
        ("t_seconds_bucket", ("le", "1.0")): 3.0,
        ("t_seconds_bucket", ("le", "+Inf")): 7.0,
        ("t_seconds_count",): 7.0,
        ("t_seconds_sum",): 12.5,
    }
    _, text = get(f"{url}/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert text.endswith("# EOF\n")


def test_a_probe_hears_whether_and_why(served):
    source, url = served
    assert get(f"{url}/readyz") == (200, "ok\n")
    source.wrong = ["the view is away", "a second thing"]
    assert get(f"{url}/readyz") == (503, "the view is away\na second thing\n")
    assert get(f"{url}/healthz") == (200, "ok\n")
    assert get(f"{url}/other")[0] == 404


def test_a_port_in_use_and_a_bad_address_name_the_setting():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            SettingsError, match=rf"the port: cannot listen on port {port} of 127.0.0.1: Address already"
        ):
            Endpoint(Source(), "127.0.0.1", port, NAMES)
    with pytest.raises(SettingsError, match=r"the address: 'nowhere.invalid' is no address"):
        Endpoint(Source(), "nowhere.invalid", 0, NAMES)
    with pytest.raises(SettingsError, match=r"the address: '192.0.2.1' is no address of this machine"):
        Endpoint(Source(), "192.0.2.1", 0, NAMES)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(
        SettingsError, match=r"the port: .* not installed. pip install 'celery-kafka-backend\[metrics\]'"
    ):
        Endpoint(Source(), "127.0.0.1", 0, NAMES)


def test_names_keep_prometheus_conventions():
    for metric in metrics.ALL:
        assert re.fullmatch(r"celery_kafka_[a-z]+(_[a-z]+)*", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert metric.help.endswith(".")
        assert not {"task", "task_id", "pid", "worker", "host"} & set(metric.labels)
    assert len({metric.name for metric in metrics.ALL}) == len(metrics.ALL)


def test_the_documentation_lists_exactly_the_metrics_there_are():
    rows = re.findall(r"^\| `(celery_kafka_\w+)` \| (\w+) \|([^|]*)\|", DOCS.read_text(), re.MULTILINE)
    documented = {name: (kind, re.findall(r"`(\w+)`", labels)) for name, kind, labels in rows}
    assert len(documented) == len(rows)
    assert documented == {metric.name: (metric.kind, list(metric.labels)) for metric in metrics.ALL}
