"""Which store a URL means."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest

from celery_kafka_backend.errors import SettingsError
from celery_kafka_backend.sinks import registry


def test_an_unknown_scheme_is_named_with_the_known_ones():
    """The URL, which may hold a password, is not repeated."""
    with pytest.raises(SettingsError) as caught:
        registry.store("couch://:hunter2@h/db")
    assert "'couch'" in str(caught.value)
    for scheme in ("memory", "redis", "rediss", "sqlite"):
        assert scheme in caught.value.remedy
    assert "hunter2" not in str(caught.value)


def test_what_is_no_url_is_refused_with_its_password_masked():
    """For instance a path, or a URL with one slash."""
    with pytest.raises(SettingsError, match="is not a URL") as caught:
        registry.store("redis:/:hunter2@h")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["redis", "REDIS", "rediss"])
def test_a_missing_driver_names_the_extra(scheme: str):
    """In a process of its own, where importing the driver fails as if it were not installed."""
    program = f"""
        import sys
        from celery_kafka_backend.errors import SettingsError
        from celery_kafka_backend.sinks import registry

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "redis":
                    raise ModuleNotFoundError("No module named 'redis'", name=name)

        sys.meta_path.insert(0, Absent())
        try:
            registry.store("{scheme}://:hunter2@h/0")
        except SettingsError as exc:
            print(exc)
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    assert "needs the package 'redis'" in ran.stdout
    assert "pip install 'celery-kafka-backend[redis]'" in ran.stdout
    assert "hunter2" not in ran.stdout


def test_a_third_party_store_comes_by_entry_point(monkeypatch: pytest.MonkeyPatch):
    """Named for the scheme; its module is loaded only when a URL asks for it."""
    module = SimpleNamespace(sink=lambda url, _options: ("sink", url), view=lambda url, _options: ("view", url))
    entry = SimpleNamespace(name="couch", load=lambda: module)

    def entry_points(group: str, name: str | None = None) -> list[Any]:
        assert group == "celery_kafka_backend.sinks"
        return [entry] if name in (None, "couch") else []

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    assert "couch" in registry.schemes()
    assert registry.open_sink("couch://h", None) == ("sink", "couch://h")  # type: ignore[arg-type,comparison-overlap]
    assert registry.open_view("couch://h", None) == ("view", "couch://h")  # type: ignore[arg-type,comparison-overlap]


def test_a_third_party_store_without_its_driver_names_the_package(monkeypatch: pytest.MonkeyPatch):
    """There is no extra of ours for it."""

    def load() -> None:
        raise ModuleNotFoundError("No module named 'couchdb'", name="couchdb")

    entry = SimpleNamespace(name="couch", load=load)
    monkeypatch.setattr(metadata, "entry_points", lambda group, name=None: [entry])
    with pytest.raises(SettingsError, match="install the package 'couchdb'"):
        registry.store("couch://h")
