"""A view's name is its consumer group: what changes it makes the view read the whole log again."""

from __future__ import annotations

import pytest

from celery_kafka_backend.topics import view_name


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("redis://localhost:6379/0", "redis-efb43d30"),
        ("sqlite:////var/lib/results.db", "sqlite-2169843a"),
        ("memory://demo", "memory-90aa46eb"),
        ("mongodb://localhost:27017/celery", "mongodb-dc6ab22d"),
    ],
)
def test_a_name_stays_the_same_for_ever(url: str, name: str) -> None:
    assert view_name(url) == name


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "redis://localhost/",
        "redis://LOCALHOST:6379/0",
        "redis://user:old@localhost/0",
        "redis://:new@localhost:6379/0",
        "redis://localhost/0?socket_timeout=3",
        "redis://localhost?db=0",
    ],
)
def test_credentials_timeouts_and_defaults_do_not_change_it(url: str) -> None:
    assert view_name(url) == view_name("redis://localhost:6379/0")


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("mongodb://a/x", "mongodb://u:p@a:27017/x?w=1"),
        ("mongodb://a,b:27018/x", "mongodb://b:27018,A:27017/x"),
        ("elasticsearch:///x", "elasticsearch://u:p@localhost:9200/x"),
        ("elasticsearch+https://a,b/x", "elasticsearch+https://b:9200,a:9200/x"),
        ("cassandra://a,b/x", "cassandra://u:p@b,a:9042/x"),
    ],
)
def test_a_port_that_goes_without_saying_and_the_order_of_hosts_do_not_change_it(short: str, long: str) -> None:
    assert view_name(short) == view_name(long)
    assert view_name(short) != view_name(short.replace("a", "c").replace("///", "//c/"))


def test_another_host_port_database_or_path_is_another_view() -> None:
    urls = [
        "redis://a/0",
        "redis://a/1",
        "redis://a?db=2",
        "redis://a:6380/0",
        "redis://b/0",
        "redis://[::1]/0",
        "rediss://a/0",
        "sqlite:///a.db",
        "sqlite:////a.db",
        "memory://a",
    ]
    assert len({view_name(url) for url in urls}) == len(urls)


def test_it_never_shows_a_password() -> None:
    assert "secret" not in view_name("redis://:secret@host/0")


def test_sentinels_are_one_view_in_any_order_and_with_any_password() -> None:
    name = view_name("sentinel://a:26379/0;sentinel://b:26379/0")
    assert name == view_name("sentinel://:new@b/0;sentinel://:new@a/0")
    assert name != view_name("sentinel://a/1;sentinel://b/1")
    assert name != view_name("sentinel://a/0")
