"""What a user may configure, what is refused and with which words, and that no secret is ever shown."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_kafka_backend import events
from celery_kafka_backend.errors import SettingsError
from celery_kafka_backend.settings import SETTING, Settings, mask, parse
from tests.examples import tried_on

URL = "kafka://b1:9092,b2:9092/?view=redis://r:6379/0"
SECRET = "s3cr3t-hunter2"

ACCEPTED: dict[str, Any] = {
    "bootstrap_servers": "b1:9092,b2:9092",
    "views": ["redis://r:6379/0"],
    "topic_prefix": "proj.results-1_a",
    "delivery": "buffered",
    "delivery_timeout_s": 5,
    "publish_timeout_s": 1.5,
    "spool": "/var/lib/celery/spool",
    "spool_after_s": 0.5,
    "spool_max_bytes": 1 << 20,
    "record": ["sent", "success"],
    "record_ignored": False,
    "exclude": ["proj.noisy", "proj.metrics.*"],
    "sample": {"proj.tick": 0.01},
    "record_messages": ["proj.pay", "proj.*"],
    "record_messages_bytes": 65_536,
    "redact": "proj.privacy.redact",
    "max_message_bytes": 4_000_000,
    "claim_check": "s3://bucket/claims",
    "claim_check_bytes": 100_000,
    "claim_check_options": {"secret": SECRET},
    "chords": "view",
    "partitions": 48,
    "chord_partitions": 3,
    "insight": False,
    "insight_partitions": 8,
    "replication_factor": 3,
    "min_insync_replicas": 1,
    "retention_ms": 1,
    "chord_key": SECRET,
    "chord_deadline_s": 3600,
    "chord_max_bytes": 1 << 20,
    "history": {"redis": False},
    "history_limit": 0,
    "history_retention_ms": 0,
    "barrier_timeout_s": 1.5,
    "poll_interval_s": 2,
    "metrics_port": 0,
    "metrics_address": "::1",
    "health_timeout_s": 5,
    "client": {"sasl.password": SECRET, "acks": "all"},
    "producer": {"enable.idempotence": True, "linger.ms": 5},
    "consumer": {"enable.auto.commit": "false", "fetch.min.bytes": 1},
    "view_options": {"redis": {"socket_timeout": 3}},
}


def refused(given: Any, url: str = URL) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        parse(url, given)
    error = caught.value
    assert error.remedy, f"no remedy: {error}"
    assert error.setting in str(error)
    assert error.problem in str(error)
    assert SECRET not in f"{error} {error!r} {error.__cause__!r}"
    return error


def test_the_url_is_enough():
    """Everything else has a default."""
    found = parse(URL)
    assert found.bootstrap_servers == "b1:9092,b2:9092"
    assert found.views == ("redis://r:6379/0",)
    assert (found.topic_prefix, found.delivery, found.record) == ("celery", "acknowledged", events.KINDS)


def test_every_setting_is_covered_here():
    """A new setting needs a case."""
    assert set(ACCEPTED) == set(Settings.__struct_fields__)
    assert {name for name, _, _ in REFUSED} | {"record_ignored"} >= set(ACCEPTED) - {"bootstrap_servers"}


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_setting_is_taken(name: str):
    """Alone, beside the URL."""
    value = getattr(parse(URL, {name: ACCEPTED[name]}), name)
    expected = ACCEPTED[name]
    assert (sorted(value) if isinstance(value, frozenset) else list(value) if isinstance(value, tuple) else value) == (
        expected
    )


def test_servers_and_views_may_stand_in_the_dictionary():
    """The bare kafka:// leaves both to it; a single view needs no list."""
    found = parse("kafka://", {"bootstrap_servers": "b1", "views": "sqlite:////tmp/v.db"})
    assert (found.bootstrap_servers, found.views) == ("b1", ("sqlite:////tmp/v.db",))
    assert parse(URL, {"views": "redis://r:6379/0"}).views == ("redis://r:6379/0",)


REFUSED: list[tuple[str, Any, str]] = [
    ("delivery", "fast", "acknowledged, pipelined, buffered"),
    ("chords", "redis", "kafka, view"),
    ("delivery_timeout_s", 0, "0"),
    ("delivery_timeout_s", math.nan, "nan"),
    ("delivery_timeout_s", math.inf, "inf"),
    ("delivery_timeout_s", "30", "'30'"),
    ("publish_timeout_s", -1, "-1"),
    ("barrier_timeout_s", 0, "0"),
    ("poll_interval_s", 0, "0"),
    ("metrics_port", 65_536, "65536"),
    ("metrics_port", "http", "a port from 1 to 65535"),
    ("metrics_address", "", "127.0.0.1"),
    ("health_timeout_s", 0, "0"),
    ("topic_prefix", "", "''"),
    ("topic_prefix", "a b", "'a b'"),
    ("topic_prefix", "ü", "'ü'"),
    ("topic_prefix", "..", "'..'"),
    ("topic_prefix", "a" * 201, "200"),
    ("topic_prefix", "a\n", "letters"),
    ("record", ["sent", "gossip"], "gossip"),
    ("record", "sent", "list"),
    ("record_ignored", 1, "1"),
    ("exclude", "proj.*", "list"),
    ("exclude", ["*.noisy"], "*.noisy"),
    ("exclude", [""], "''"),
    ("sample", {"t": 1.5}, "1.5"),
    ("sample", {"t": math.nan}, "nan"),
    ("sample", ["t"], "dictionary"),
    ("record_messages", 5, "5"),
    ("record_messages_bytes", -1, "-1"),
    ("redact", "redact", "'redact'"),
    ("redact", "a b.c", "'a b.c'"),
    ("max_message_bytes", 100, "100"),
    ("max_message_bytes", 1_000_000_001, "1000000000"),
    ("claim_check", 5, "5"),
    ("claim_check_bytes", 10, "10"),
    ("chord_max_bytes", 10, "10"),
    ("chord_deadline_s", -1, "-1"),
    ("chord_deadline_s", math.nan, "nan"),
    ("claim_check_options", SECRET, "not shown"),
    ("partitions", 0, "0"),
    ("partitions", True, "True"),
    ("partitions", 2.5, "2.5"),
    ("partitions", 1 << 31, "2147483647"),
    ("chord_partitions", -1, "-1"),
    ("insight", 1, "1"),
    ("insight_partitions", 0, "0"),
    ("replication_factor", 0, "0"),
    ("min_insync_replicas", 4, "replication_factor 3"),
    ("min_insync_replicas", 0, "0"),
    ("retention_ms", 0, "0"),
    ("spool", 7, "7"),
    ("spool_after_s", 0, "0"),
    ("spool_max_bytes", 1000, "1000"),
    ("chord_key", b"bytes", "not shown"),
    ("history", {"redis": "yes"}, "True or False"),
    ("history", {1: True}, "scheme"),
    ("history_limit", -1, "-1"),
    ("history_retention_ms", -1, "0 for ever"),
    ("history_retention_ms", "90d", "'90d'"),
    ("history_retention_ms", 1.5, "None for as long as results"),
    ("history_retention_ms", True, "a whole number"),
    ("history_retention_ms", 36_525 * 86_400_000 + 1, "0 for ever"),
    ("views", [], "no view"),
    ("views", ["redis.example"], "redis.example"),
    ("views", ["redis:/r"], "redis:/r"),
    ("views", ["redis://r/0", "redis://r/0"], "redis://r/0"),
    ("views", 7, "a list of URLs"),
    ("client", {"bootstrap.servers": "x"}, "bootstrap_servers"),
    ("client", {"metadata.broker.list": "x"}, "bootstrap_servers"),
    ("client", {"group.id": "x"}, "topic_prefix"),
    ("client", {"message.max.bytes": 1}, "max_message_bytes"),
    ("client", {"acks": 1}, "'all'"),
    ("client", {"enable.auto.commit": True}, "False"),
    ("client", [SECRET], "dictionary"),
    ("producer", {"acks": "1"}, "'all'"),
    ("producer", {"acks": ["all"]}, "'all'"),
    ("producer", {"request.required.acks": 0}, "'all'"),
    ("producer", {"enable.idempotence": "false"}, "True"),
    ("producer", {"max.in.flight": 5}, "1"),
    ("client", {"max.in.flight.requests.per.connection": "2"}, "1"),
    ("producer", {"transactional.id": "x"}, "transactional.id"),
    ("consumer", {"enable.auto.commit": "true"}, "False"),
    ("consumer", {"auto.offset.reset": "latest"}, "'earliest'"),
    ("view_options", {"redis": SECRET}, "scheme"),
]


@pytest.mark.parametrize(("name", "value", "says"), REFUSED)
def test_a_wrong_value_is_refused_by_name_with_value_and_remedy(name: str, value: Any, says: str):
    """At start, before anything is connected."""
    url = "kafka://b1:9092" if name == "views" else URL
    error = refused({name: value}, url)
    assert says in str(error)
    assert name in str(error) or (name, value) == ("views", [])


def test_an_option_of_the_other_side_is_not_ours_to_judge():
    """A consumer has no acks, a producer no offsets; librdkafka says so itself."""
    assert parse(URL, {"consumer": {"acks": "1"}, "producer": {"auto.offset.reset": "latest"}})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("topic_prefx", "did you mean 'topic_prefix'?"),
        ("zzz", "known: barrier_timeout_s, bootstrap_servers"),
        (7, "known"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest_name(name: Any, says: str):
    """Or with all of them."""
    error = refused({name: 1})
    assert error.setting == f"{SETTING}[{name!r}]"
    assert says in error.remedy


@pytest.mark.parametrize("given", [["a"], "text", 7, [("a", "b", "c")]])
def test_settings_that_are_no_dictionary_are_refused(given: Any):
    """Not with a TypeError."""
    assert "dictionary" in str(refused(given))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://:s3cr3t-hunter2@r/0", "redis://:**@r/0 is not a kafka:// URL"),
        ("kafka://b1:9092", "no view"),
        ("kafka:///?view=redis://r", "no Kafka servers"),
        ("kafka://b1/topic?view=redis://r", "(/topic)"),
        ("kafka://b1/redis://:s3cr3t-hunter2@r/0", "means nothing"),
        ("kafka://u:s3cr3t-hunter2@b1/?view=redis://r", "sasl.username"),
        ("kafka://u:s3cr3t-hunter2@[b1/?view=redis://r", "is not a URL"),
        ("kafka://u:s3cr3t-hunter2@b\u2100/?view=redis://r", "is not a URL"),
        ("kafka://b1/?view=redis://r&history=1", "'history'"),
        ("kafka://b1/?view=redis://:s3&cr3t-hunter2@r", "percent-encoded"),
        ("kafka://b1/?view=redis://:p#w@r", "%23"),
        ("kafka://b1/?view=", "'' is not a URL"),
        ("kafka://b1/?view=redis:/:s3cr3t-hunter2@r", "is not a URL"),
        ("kafka://b1/?view=redis://r&view=redis://r", "twice"),
    ],
)
def test_a_wrong_url_is_refused(url: str, says: str):
    """With what to write instead, and no password."""
    error = refused(None, url)
    assert says in str(error)
    assert "cr3t-hunter2" not in str(error)


def test_what_differs_between_url_and_dictionary_is_refused():
    """With both values, masked."""
    error = refused({"bootstrap_servers": "b3"})
    assert "'b3'" in str(error)
    assert "'b1:9092,b2:9092'" in str(error)
    error = refused({"views": [f"redis://:{SECRET}@other/0"]})
    assert "redis://:**@other/0" in str(error)
    assert "redis://r:6379/0" in str(error)
    refused({"views": 7})
    refused({"views": [7]})


def test_credentials_beside_the_servers_are_refused():
    """They would be ignored by Kafka's client, and printed."""
    assert "sasl.username" in str(refused({"bootstrap_servers": f"u:{SECRET}@b1"}, "kafka://"))


def test_several_views_keep_their_order_and_the_first_is_primary():
    """As they stand in the URL."""
    found = parse("kafka://b1/?view=redis://:a%40b@r/0&view=sqlite:////v.db&view=mongodb+srv://m/x")
    assert found.views == ("redis://:a%40b@r/0", "sqlite:////v.db", "mongodb+srv://m/x")


def test_a_view_with_parameters_of_its_own_is_percent_encoded_as_a_whole():
    """Else its second parameter would be ours; a single one needs nothing."""
    view = "redis://:p%26w@r:6379/0?a=1&b=x+y"
    assert parse(f"kafka://b1/?view={quote(view, safe='')}").views == (view,)
    assert parse("kafka://b1/?view=redis://r/0?a=1").views == ("redis://r/0?a=1",)


def test_no_repr_shows_a_secret():
    """Not the plain one, and not the one that rich and its tracebacks ask for."""
    found = parse(
        f"kafka://b1/?view=redis://:{SECRET}@r/0&view=redis://r/1?password={SECRET}",
        {name: ACCEPTED[name] for name in ("client", "chord_key")} | {"view_options": {"redis": {"password": SECRET}}},
    )
    shown = f"{found} {found!r} {found.__rich_repr__()}"
    assert SECRET not in shown
    assert "redis://:**@r/0" in shown


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        (URL, URL),
        ("kafka://b1:9092,b2:9092/?view=redis://:pw@r:6379/0", "kafka://b1:9092,b2:9092/?view=redis://:**@r:6379/0"),
        (
            "kafka://b1/?view=redis://:p@r/0&view=redis://u:q@s/1",
            "kafka://b1/?view=redis://:**@r/0&view=redis://u:**@s/1",
        ),
        ("kafka://b1/?view=redis%3A%2F%2F%3Apw%40r%2F0", "kafka://b1/?view=redis://:**@r/0"),
        ("kafka://b1/?view=redis://h%3Fpassword%3Dpw", "kafka://b1/?view=**"),
        ("kafka://b1/?view=redis%3A%2F%2Fh%3Fpassword%3Da%2526b", "kafka://b1/?view=redis://h?password=**"),
        ("redis://u:p@h/0", "redis://u:**@h/0"),
        ("redis://h:6379/0?password=pw&x=1", "redis://h:6379/0?password=**&x=1"),
        ("redis://h/0?ssl_keyfile_Password=pw", "redis://h/0?ssl_keyfile_Password=**"),
        ("redis://:p@w@h/0", "redis://:**@h/0"),
        ("redis://:p/w@h/0", "redis://:**@h/0"),
        ("redis://:p?w@h/0", "redis://:**@h/0"),
        ("redis://:p#w@h/0", "redis://:**@h/0"),
        ("redis://[::1]:6379/0", "redis://[::1]:6379/0"),
        ("redis://u:p@[::1]:6379/0", "redis://u:**@[::1]:6379/0"),
        ("sentinel://:p@h1:1;sentinel://:q@h2:1/0", "sentinel://:**@h2:1/0"),
        ("mongodb://u:p@h1,h2:27017/db?replicaSet=a", "mongodb://u:**@h1,h2:27017/db?replicaSet=a"),
        ("sqlite:////home/a@b/v.db", "sqlite:////home/a@b/v.db"),
        ("b1:9092,b2:9092", "b1:9092,b2:9092"),
        ("", ""),
    ],
)
def test_mask_hides_passwords_and_little_else(url: str, masked: str):
    """Hosts, ports, paths and the other parameters stay readable."""
    assert mask(url) == masked
    assert mask(masked) == masked


raw = st.text(st.characters(codec="ascii", exclude_characters="&%", categories=["L", "N", "P", "S"]), max_size=12)


@given(raw, st.text(st.characters(exclude_categories=["Cs"]), max_size=12), st.integers(1, 3))
@tried_on(60)
def test_mask_never_leaks_a_password(ugly: str, encoded: str, times: int):
    """Raw with almost any character in it, or percent-encoded, in views, in views' parameters, encoded again."""
    marker = "QX7"
    for secret in (f"{marker}{ugly}{marker}", quote(f"{marker}{encoded}{marker}", safe="")):
        for view in (f"redis://:{secret}@h:6379/0", f"redis://u:{secret}@h", f"redis://h:1/0?password={secret}"):
            assert marker not in mask(view)
            nested = view
            for _ in range(times):
                assert marker not in mask(f"kafka://b1:9092/?view=sqlite:///x&view={nested}&view=redis://r")
                nested = quote(nested, safe="")
            assert marker not in mask(f"kafka://b1:9092/?view={nested}")


FIRST_USE = """
import faulthandler, threading, time, typing

faulthandler.enable()
set_attribute = typing._BaseGenericAlias.__setattr__

def slowly(self, name, value):
    if name == "__msgspec_cache__":  # msgspec is at work on the types, and another thread gets its turn
        time.sleep(0.2)
    set_attribute(self, name, value)

typing._BaseGenericAlias.__setattr__ = slowly
from celery_kafka_backend import settings

def parse():
    settings.parse("kafka://b1:9092/?view=redis://x", {"metrics_port": 0, "client": {}})

first = threading.Thread(target=parse)
first.start()
time.sleep(0.1)
parse()
first.join()
print("fine")
"""


def test_two_threads_may_be_the_first():
    """What msgspec does at the first use of a class it does for one thread only."""
    said = subprocess.run([sys.executable, "-c", FIRST_USE], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert said.stdout == "fine\n"
