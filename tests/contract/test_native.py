"""Under Celery's own key or row stands what Celery's own backend would have written: a stock client reads it.

The client is another process, in which our package cannot be imported.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from celery import VERSION, Celery
from celery.app.task import Context
from celery.backends.base import KeyValueStoreBackend
from celery.result import GroupResult
from kombu.utils.encoding import ensure_bytes

from celery_kafka_backend import codec, events
from celery_kafka_backend.events import Opaque
from celery_kafka_backend.order import Rank, order_key, run_at
from celery_kafka_backend.writes import _plain
from tests.contract.factories import FAR, RUN, R, batch, event_id, forgotten, group_saved, sent, stated
from tests.patience import PATIENCE_S

if TYPE_CHECKING:
    from tests.contract.conftest import Place

READER = Path(__file__).with_name("stock_reader.py")
SERIALIZERS = ["json", "pickle", "yaml", "msgpack"]
STATES: dict[str, Any] = {
    "SUCCESS": {"text": "ä\n'\"", "list": [1, 2.5, None, True], "empty": []},
    "FAILURE": ValueError("why", 3),
    "RETRY": RuntimeError("later"),
    "REVOKED": None,
    "STARTED": {"pid": 12, "hostname": "celery@host"},
    "PROGRESS": {"done": 3},
}


class _Encoder(KeyValueStoreBackend):
    """Celery's own encoding, with no store behind it."""

    supports_result_compression = True


def documents(conf: dict[str, Any], suffix: str) -> list[events.Event]:
    """One event for each state, its document encoded by Celery."""
    app = Celery("writer", set_as_current=False)
    app.conf.update(conf)
    backend = _Encoder(app)
    request = Context(
        id="x", task="proj.add", args=[1, "é"], kwargs={"k": [2]}, hostname="celery@host", retries=2,
        delivery_info={"routing_key": "slow"}, children=[], stamped_headers=["tenant"], stamps={"tenant": ["acme"]},
    )  # fmt: skip
    found = []
    for at, (state, value) in enumerate(STATES.items()):
        task = f"{state}-{suffix}"
        result = backend.prepare_exception(value) if isinstance(value, Exception) else value
        trace = "Traceback …\nValueError" if state == "FAILURE" else None
        meta = backend._get_result_meta(result=result, state=state, traceback=trace, request=request)
        meta["children"] = [(("child", None), None)] if state == "SUCCESS" else []
        meta["task_id"] = task
        encoded = ensure_bytes(backend.encode(meta))
        about: dict[str, Any] = {"attempt": 2, "queue": "slow", "worker": "celery@host"}
        if codec.is_json_document(encoded):
            event = stated(state, at, task=task, document=encoded, id=event_id(task), **about)
        else:
            parts = {
                part: ensure_bytes(backend._encode(meta[part])[2])
                for part in ("result", "children", "args", "kwargs")
                if part == "result" or meta.get(part) is not None
            }
            opaque = Opaque(
                meta=encoded, content_type=backend.content_type, traceback=trace, plain=_plain(meta), **parts
            )
            event = stated(state, at, task=task, opaque=opaque, id=event_id(task), **about)
        done = meta["date_done"]
        found.append(msgspec.structs.replace(event, date_done=done, name="proj.add"))
    return found


def read(jobs: list[dict[str, Any]]) -> list[Any]:
    """Let the stock client do the jobs."""
    command = [sys.executable, "-I", str(READER)]
    done = subprocess.run(
        command, input=json.dumps(jobs), capture_output=True, text=True, timeout=2 * PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def job(place: Place, tasks: list[str], groups: list[str], **conf: Any) -> dict[str, Any]:
    """What the stock client is to look up, with Celery's own backend for the same store."""
    if not place.celery:
        pytest.skip("Celery has no backend for our memory")
    told = {name: value for name, value in place.celery.items() if name != "backend"}
    return {"backend": place.celery["backend"], "conf": {**told, **conf}, "tasks": tasks, "groups": groups}


def available() -> list[str]:
    """Serializers whose package is installed."""
    from kombu.serialization import registry  # noqa: PLC0415

    return [name for name in SERIALIZERS if name in registry._encoders and (name != "msgpack" or _has("msgpack"))]


def _has(module: str) -> bool:
    from importlib.util import find_spec  # noqa: PLC0415

    return find_spec(module) is not None


def test_a_stock_client_reads_every_state_in_every_serializer(place: Place) -> None:
    pytest.importorskip("sqlalchemy")
    jobs, sink = [], place.sink()
    compressions = [None] if place.url.startswith("sqlite") else [None, "gzip"]
    # Elasticsearch holds JSON: Celery's own backend for it fails on bytes, and msgpack has no other form.
    unsaid = {"msgpack"} if place.url.startswith("elasticsearch") else set()
    for serializer in [name for name in available() if name not in unsaid]:
        for extended in (False, True):
            for compression in compressions:
                conf = {"result_serializer": serializer, "result_extended": extended, "accept_content": SERIALIZERS}
                conf |= {"result_accept_content": SERIALIZERS, "result_compression": compression}
                suffix = f"{serializer}-{extended}-{compression}"
                sink.write(batch(*documents(conf, suffix)))
                group = group_saved(f"g-{suffix}", members=("SUCCESS-json-False-None", "other"))
                saves = place.groups and serializer == "json" and compression is None
                if saves:
                    sink.write(batch(group))
                jobs.append(job(place, [f"{s}-{suffix}" for s in STATES], [group.task] if saves else [], **conf))
    if pickles_only(jobs[0]):
        with pytest.raises(AssertionError, match="UnpicklingError"):
            read(jobs)
        return
    for asked, answer in zip(jobs, read(jobs), strict=True):
        for task, seen in answer["tasks"].items():
            state = task.partition("-")[0]
            extended = place.extended and asked["conf"]["result_extended"]
            assert seen["state"] == state
            _check_result(seen, state, task)
            assert seen["children"] == (["child"] if state == "SUCCESS" else []), task
            assert (seen["date_done"] is not None) == (place.dated or state in {"SUCCESS", "FAILURE", "REVOKED"}), task
            about = tuple(seen[part] for part in ("name", "args", "kwargs", "worker", "retries", "queue"))
            expected = ("proj.add", [1, "é"], {"k": [2]}, "celery@host", 2, "slow") if extended else (None,) * 6
            assert about == expected, task
        assert all(members == ["SUCCESS-json-False-None", "other"] for members in answer["groups"].values())


def pickles_only(asked: dict[str, Any]) -> bool:
    """Return whether such a Celery keeps results in SQL as pickles, and reads nothing else."""
    return VERSION[:2] < (5, 7) and str(asked["backend"]).startswith("db+")


def _check_result(seen: dict[str, Any], state: str, task: str) -> None:
    value = STATES[state]
    if isinstance(value, Exception):
        assert seen["result"] == repr(value), task
    elif state == "REVOKED":
        assert seen["type"] in {"TaskRevokedError", "Exception", "NoneType"}, task
    else:
        assert seen["result"] == value, task
    if state == "FAILURE":
        assert seen["traceback"] == "Traceback …\nValueError"


@pytest.mark.skipif(VERSION[:2] < (5, 7), reason="such a Celery compresses nothing, and pickles everything in SQL")
@pytest.mark.filterwarnings("ignore")  # of what Celery's backends say of compression and of their drivers
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_we_read_what_celery_s_own_backend_wrote_in_every_serializer(place: Place, compression: str | None) -> None:
    pytest.importorskip("sqlalchemy")
    told = job(place, [], [])
    place.sink()
    # Celery's own backend for Elasticsearch fails on bytes.
    written = ["json", "yaml"] if place.url.startswith("elasticsearch") else available()
    values: dict[str, Any] = {"deep": STATES["SUCCESS"], "nothing": None, "number": 53, "text": "x\ny: 'z'"}
    for serializer in written:
        app = Celery("stock", backend=told["backend"], set_as_current=False)
        app.conf.update(told["conf"], result_serializer=serializer, result_compression=compression)
        app.conf.update(accept_content=SERIALIZERS, result_accept_content=SERIALIZERS)
        view = place.view(serializer=serializer)
        for name, value in values.items():
            app.backend.store_result(f"{name}-{serializer}", value, "SUCCESS")
        app.backend.store_result(f"wrong-{serializer}", ValueError("why"), "FAILURE", traceback="Trace\nback")
        ids = {name: f"{name}-{serializer}" for name in (*values, "wrong")}
        documents = view.documents(list(ids.values()))
        found = {name: _Encoder(app).decode_result(documents[task]) for name, task in ids.items()}
        assert {name: (found[name]["status"], found[name]["result"]) for name in values} == {
            name: ("SUCCESS", value) for name, value in values.items()
        }
        assert (found["wrong"]["status"], repr(found["wrong"]["result"])) == ("FAILURE", "ValueError('why')")
        assert found["wrong"]["traceback"] == "Trace\nback"
        if place.groups and serializer == "json":
            GroupResult("g", [app.AsyncResult("member")]).save(backend=app.backend)
            gc.collect()  # a cycle holds it, and the end of a result fails at the end of Python
            saved = _Encoder(app).decode(view.groups(["g"])["g"])["result"]
            assert [saved[0][0], *(each[0][0] for each in saved[1])] == ["g", "member"]


def test_a_stock_client_sees_nothing_of_a_forgotten_task_and_of_one_only_sent(place: Place) -> None:
    asked = job(place, ["forgotten", "sent"], ["nobody"] if place.groups else [])
    sink = place.sink()
    sink.write(batch(stated("SUCCESS", 10, task="forgotten"), sent(0, task="sent")))
    sink.write(batch(forgotten(20, task="forgotten")))
    (answer,) = read([asked])
    assert [seen["state"] for seen in answer["tasks"].values()] == ["PENDING", "PENDING"]
    assert answer["groups"] == ({"nobody": None} if place.groups else {})


@pytest.mark.redis
def test_a_stock_client_that_already_waits_in_get_is_woken(redis_url: str) -> None:
    import redis  # noqa: PLC0415

    from celery_kafka_backend.sinks import registry  # noqa: PLC0415
    from celery_kafka_backend.sinks.contract import StoreOptions  # noqa: PLC0415

    task = event_id(redis_url + str(time.time_ns()))
    sink = registry.open_sink(redis_url, StoreOptions())
    sink.open()
    command = [sys.executable, "-I", str(READER)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write(json.dumps([{"backend": redis_url, "conf": {}, "get": task}]))
        client.stdin.close()
        assert client.stdout.readline() == "ready\n"
        with redis.Redis.from_url(redis_url) as server:
            deadline = time.monotonic() + PATIENCE_S
            while not server.pubsub_numsub(f"celery-task-meta-{task}")[0][1]:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        sink.write(batch(stated("STARTED", 5, task=task)))
        sink.write(batch(stated("SUCCESS", 10, task=task, value=[1, "woken"])))
        assert json.loads(client.stdout.readline()) == [[1, "woken"]]
    sink.close()
    assert client.returncode == 0


@pytest.mark.parametrize("serializer", available())
@pytest.mark.filterwarnings("ignore:Call to deprecated setex")
@pytest.mark.redis
def test_a_stock_success_is_known_in_every_serializer(redis_url: str, serializer: str) -> None:
    """Written by the stock backend itself, with all it writes; only a compressed one cannot be told."""
    import redis  # noqa: PLC0415

    from celery_kafka_backend.sinks import registry  # noqa: PLC0415
    from celery_kafka_backend.sinks.contract import StoreOptions  # noqa: PLC0415

    app = Celery("stock", backend=redis_url, set_as_current=False)
    app.conf.update(result_serializer=serializer, accept_content=SERIALIZERS, result_accept_content=SERIALIZERS)
    app.conf.update(result_extended=True)
    app.backend.store_result("done", {"status": "FAILURE"}, "SUCCESS")
    app.backend.store_result("failed", {"status": "SUCCESS", "deep": {"status": "SUCCESS"}}, "PROGRESS")
    sink = registry.open_sink(redis_url, StoreOptions())
    sink.open()
    later = run_at(R) + 1
    assert order_key(Rank.FAILED, R, later) > order_key(Rank.SUCCEEDED, R, RUN)
    with redis.Redis.from_url(redis_url) as server:
        before = server.get("celery-task-meta-done")
        sink.write(
            batch(*(stated("STARTED", 9_000, task=task, run=later, expires_at=FAR) for task in ("done", "failed")))
        )
        assert server.get("celery-task-meta-done") == before
        assert server.get("celery-task-meta-failed") == stated("STARTED", 9_000, task="failed").document
    sink.close()
    app.backend.client.close()
