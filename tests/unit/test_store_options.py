"""Celery's own settings for a store reach its driver under the driver's names."""

from __future__ import annotations

import pytest
from celery import Celery
from celery.exceptions import ImproperlyConfigured

from celery_kafka_backend.configure import store_options
from celery_kafka_backend.settings import parse


def options(view: str, view_options: dict | None = None, **conf):
    app = Celery("options", set_as_current=False)
    app.conf.update(conf)
    settings = parse(f"kafka://b/?view={view}", {"view_options": view_options or {}})
    return store_options(app, settings, view).options


@pytest.mark.parametrize("view", ["mongodb://h/db", "mongodb+srv://h/db"])
def test_mongodb_s_settings_by_name(view):
    given = {
        "database": "results", "taskmeta_collection": "tasks", "groupmeta_collection": "groups", "user": "u",
        "password": "p", "host": "other", "port": 1, "max_pool_size": 3, "tz_aware": True,
        "options": {"replicaSet": "rs0", "tz_aware": False},
    }  # fmt: skip
    assert options(view, mongodb_backend_settings=given) == {
        "database": "results", "taskmeta_collection": "tasks", "groupmeta_collection": "groups", "username": "u",
        "password": "p", "host": "other", "port": 1, "maxPoolSize": 3, "tz_aware": True, "replicaSet": "rs0",
    }  # fmt: skip
    assert options(view) == {}
    assert "database" not in options("redis://h/0", mongodb_backend_settings=given)


def test_view_options_are_laid_over_celery_s():
    found = options("mongodb://h/db", {"mongodb": {"database": "b"}}, mongodb_backend_settings={"database": "a"})
    assert found == {"database": "b"}


@pytest.mark.parametrize("view", ["elasticsearch://h/i", "elasticsearch+https://h/i"])
def test_elasticsearch_s_settings_by_name(view):
    given = {"timeout": 3.5, "max_retries": 1, "retry_on_timeout": True, "save_meta_as_text": False}
    found = options(view, {"elasticsearch": {"api_key": "k"}}, **{f"elasticsearch_{n}": v for n, v in given.items()})
    assert found == {
        "request_timeout": 3.5, "max_retries": 1, "retry_on_timeout": True, "save_meta_as_text": False, "api_key": "k",
    }  # fmt: skip
    assert options(view) == {"save_meta_as_text": True}


def test_mongodb_s_settings_must_be_a_dictionary():
    with pytest.raises(ImproperlyConfigured, match="mongodb_backend_settings"):
        options("mongodb://h/db", mongodb_backend_settings="database")
