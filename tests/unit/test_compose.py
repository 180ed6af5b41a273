"""The files in ``compose/`` are valid, and say what the native servers do. They start no container."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from celery_kafka_backend import metrics
from tests.patience import PATIENCE_S
from tests.services import docker, kafka

FILES = [docker.ONE, docker.THREE_BROKERS]


def services(file) -> dict[str, dict]:
    """Return the services of a compose file, by name."""
    return yaml.safe_load(file.read_text())["services"]


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not installed")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_docker_compose_accepts_the_file(file) -> None:
    """Also the old program that Debian ships; this needs no engine."""
    checked = subprocess.run(
        ["docker-compose", "-f", str(file), "config", "--quiet"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(("file", "brokers"), [(docker.ONE, 1), (docker.THREE_BROKERS, 3)], ids=["one", "three"])
def test_containers_and_native_brokers_keep_as_many_copies(file, brokers) -> None:
    """The version too: what is tested natively is what the containers run."""
    found = [service for service in services(file).values() if service.get("image", "").startswith("apache/kafka")]
    assert len(found) == brokers
    expected = {f"KAFKA_{key.upper().replace('.', '_')}": value for key, value in kafka.replication(brokers).items()}
    for service in found:
        assert service["image"] == f"apache/kafka:{kafka.VERSION}"
        assert expected.items() <= service["environment"].items()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_mounted_file_exists(file) -> None:
    """Docker would make an empty folder in place of a missing file, and say nothing."""
    mounted = [
        volume.split(":")[0]
        for service in services(file).values()
        for volume in service.get("volumes", ())
        if volume[0] == "."
    ]
    assert mounted
    for name in mounted:
        assert (file.parent / name).exists()


# -- alerts and the dashboard ----------------------------------------------------------------

PROMETHEUS = docker.ONE.parent / "prometheus"
DASHBOARD = docker.ONE.parent / "grafana" / "dashboards" / "pipeline.json"


def expressions() -> list[str]:
    """Return every expression of the rules and of the dashboard."""
    rules = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())
    panels = json.loads(DASHBOARD.read_text())["panels"]
    alerts = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    shown = [target["expr"] for panel in panels for target in panel["targets"]]
    assert len(alerts) > 10
    assert len(shown) > 10
    return alerts + shown


def known() -> dict[str, set[str]]:
    """Return the labels of each series that Prometheus can see."""
    found = {}
    for metric in metrics.ALL:
        labels = set(metric.labels)
        if metric.kind == "histogram":
            found |= {
                f"{metric.name}_bucket": labels | {"le"},
                f"{metric.name}_sum": labels,
                f"{metric.name}_count": labels,
            }
        else:
            found[metric.name] = labels
    return found


@pytest.mark.parametrize("expression", expressions())
def test_rules_and_dashboard_name_only_metrics_and_labels_that_exist(expression: str) -> None:
    """A name that nobody exports never alerts."""
    named = re.findall(r"(celery_kafka_\w+)(?:\{([^}]*)\})?", expression)
    assert named
    labels: set[str] = set()
    for name, selector in named:
        assert name in known()
        assert set(re.findall(r"(\w+)=", selector)) <= known()[name]
        labels |= known()[name]
    for grouped in re.findall(r"by \(([^)]*)\)", expression):
        assert {label.strip() for label in grouped.split(",")} <= labels


def test_what_an_alert_says_names_labels_that_it_has() -> None:
    """Of a sum or a maximum only those that it is taken by are left."""
    rules = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        said = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
        grouped = re.findall(r"by \(([^)]*)\)", rule["expr"])
        names = re.findall(r"celery_kafka_\w+", rule["expr"])
        has = set(re.findall(r"\w+", " ".join(grouped))) if grouped else set.union(*(known()[name] for name in names))
        assert said <= has, rule["alert"]


def test_prometheus_reads_every_port_that_serves_metrics() -> None:
    """And the dashboard is where Grafana looks for it."""
    scraped = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    targets = {target for job in scraped for group in job["static_configs"] for target in group["targets"]}
    serving = {
        f"{name}:{port.rsplit(':', 1)[1]}"
        for name, service in services(docker.ONE).items()
        for port in service.get("ports", ())
        if "METRICS" in port
    }
    assert targets == serving


ALERTS = Path(__file__).with_name("alerts.yml")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed")
@pytest.mark.parametrize(
    "command",
    [
        ("check", "config", PROMETHEUS / "prometheus.yml"),
        ("check", "rules", PROMETHEUS / "rules.yml"),
        ("test", "rules", ALERTS),
    ],
    ids=["config", "rules", "alerts"],
)
def test_promtool_accepts_the_files(command: tuple[str | Path, ...]) -> None:
    """Prometheus' own check; and each alert fires when what it is for happens, and not before."""
    done = subprocess.run(["promtool", *command], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tried() -> None:
    """By ``alerts.yml``."""
    rules = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    assert set(re.findall(r'alertname="(\w+)"', ALERTS.read_text())) == alerts
