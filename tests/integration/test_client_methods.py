"""Every method of Celery's results (`client_methods`), in every kind of client, and after everything went away and came back."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time

import pytest
from kombu import VERSION as KOMBU

from tests.integration.conftest import Fleet
from tests.patience import PATIENCE_S
from tests.services import kafka as kafka_service
from tests.services import native
from tests.services import redis as redis_service
from tests.services.errors import ServiceError
from tests.services.required import absent

pytestmark = [pytest.mark.kafka, pytest.mark.redis]

ALL = 20
"""As many functions as `client_methods` has; a failing one raises."""
WORKER = ("-P", "threads", "-c", "16")
"""All that is waited for runs at once, so that a broker that dies has none of it."""
PATCH = {
    "gevent": "from gevent import monkey; monkey.patch_all()",
    "eventlet": "import eventlet; eventlet.monkey_patch()",
}
THREADS = """
    import json, threading
    import client_methods

    done = []
    threads = [threading.Thread(target=lambda: done.append(client_methods.every_method())) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    print(json.dumps(done))
"""
KINDS = {
    "one thread": """
        import json
        import client_methods
        print(json.dumps([client_methods.every_method() for _ in range(2)]))
    """,
    "threads": THREADS,
    "gevent": THREADS,
    "eventlet": THREADS,
    "forks": """
        import json, multiprocessing
        import client_methods

        before = client_methods.every_method()
        with multiprocessing.get_context("fork").Pool(3) as pool:
            forks = [pool.apply_async(client_methods.every_method) for _ in range(3)]
            mine = client_methods.every_method()  # while they ask, too
            found = [before, mine, *(one.get(90) for one in forks)]
            pool.close()
            pool.join()
        print(json.dumps(found))
    """,
    "asyncio": """
        import asyncio, json
        import client_methods, fleet_app
        from celery_kafka_backend.result import KafkaResult

        async def numbers():
            sent = [fleet_app.add.delay(i, 1) for i in range(60)]
            return await asyncio.gather(*(KafkaResult.of(one) for one in sent))

        async def main():
            *found, awaited = await asyncio.gather(*(asyncio.to_thread(client_methods.every_method) for _ in range(3)), numbers())
            assert awaited == list(range(1, 61))
            return found

        print(json.dumps(asyncio.run(main())))
    """,
}


def client(fleet, kind, text, **more):
    return subprocess.Popen(
        [sys.executable, "-c", f"{PATCH.get(kind, '')}\n{textwrap.dedent(text)}"],
        env=fleet.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_method(fleet, kind):
    with client(fleet, kind, KINDS[kind]) as process:
        try:
            said, complaints = process.communicate(timeout=3 * PATIENCE_S)
        finally:
            process.kill()
    assert process.returncode == 0, complaints[-3000:]
    found = json.loads(said)
    assert len(found) >= 2, complaints[-3000:]
    assert set(found) == {ALL}


# -- everything goes away, and comes back --------------------------------------------------------

LASTING = """
    import asyncio, json, sys, threading, time, traceback
    from celery import chord, group
    import client_methods, fleet_app
    from celery_kafka_backend.result import KafkaResult

    def begun():
        naps = [fleet_app.nap.delay(6) for _ in range(2)]
        naps.append(group(fleet_app.nap.s(6) for i in range(3)).apply_async())
        naps.append(chord([fleet_app.nap.s(6), fleet_app.nap.s(6)])(fleet_app.total.s()))
        running = [*naps[:2], *naps[2].results, *naps[3].parent.results]
        while {KafkaResult.of(one).describe() for one in running} != {"started"}:
            time.sleep(0.05)
        return naps

    def wait():
        naps = begun()
        found = [None] * len(naps)
        inside = [threading.Event() for _ in naps]  # what a get reads before it waits may fail, as with any backend

        def get(number):
            try:
                found[number] = naps[number].get(timeout=180, on_interval=lambda *_: inside[number].set())
            except Exception as exc:
                found[number] = traceback.format_exc()[-2000:]

        threads = [threading.Thread(target=get, args=(n,)) for n in range(len(naps))]
        for one in threads:
            one.start()
        for one in inside:
            one.wait(180)
        print(json.dumps("waiting"), flush=True)
        for one in threads:
            one.join()
        return found

    async def wait_in_a_loop():
        naps = begun()
        of = [*naps[:2], *naps[2].results, naps[3]]
        waiting = asyncio.gather(*(KafkaResult.of(one) for one in of), return_exceptions=True)
        consumer = fleet_app.app.backend.result_consumer
        while consumer.listener is None or len(consumer.listener._waiters) < len(of) or consumer.ear._new:
            await asyncio.sleep(0.05)
        print(json.dumps("waiting"), flush=True)
        first, second, *members, body = [one if isinstance(one, int) else repr(one) for one in await waiting]
        return [first, second, members, body]

    def await_all():
        return asyncio.run(wait_in_a_loop())

    while (line := sys.stdin.readline()) != "":
        print(json.dumps({"wait": wait, "await": await_all, "methods": client_methods.every_method}[line.strip()]()), flush=True)
"""


@pytest.fixture
def fragile(tmp_path):
    """A fleet on servers of its own that keep their data when they are killed."""
    started = []
    try:
        for name, start in (
            ("redis", lambda: redis_service.start(appendonly=True)),
            ("redis", lambda: redis_service.start(appendonly=True)),
            ("kafka", kafka_service.start),
        ):
            try:
                started.append(start())
            except ServiceError as error:
                absent(name, error)
        broker, view, kafka = started
        with Fleet(kafka.bootstrap, broker.url, view.url, tmp_path, {}, {}) as fleet:
            fleet.serve(*WORKER)
            yield fleet, {"view": view, "broker": broker, "kafka": kafka.brokers[0]}
    finally:
        for server in started:
            server.stop()


@pytest.mark.parametrize("kinds", [("threads", "gevent"), ("eventlet", "asyncio")], ids=" and ".join)
def test_clients_that_wait_and_clients_that_ask_outlive_everything(fragile, kinds):
    fleet, servers = fragile
    with client(fleet, kinds[0], LASTING, stdin=subprocess.PIPE) as one, client(
        fleet, kinds[1], LASTING, stdin=subprocess.PIPE
    ) as other:  # fmt: skip
        both = one, other
        try:
            for each in both:
                ask(each, "methods")
            assert [answer(each, fleet) for each in both] == [ALL, ALL]
            for each, kind in zip(both, kinds, strict=True):
                ask(each, "await" if kind == "asyncio" else "wait")
            assert [answer(each, fleet) for each in both] == ["waiting", "waiting"]
            for server in servers.values():
                server.kill()
            time.sleep(1)  # that they notice
            for server in servers.values():
                server.restart()
            assert [answer(each, fleet) for each in both] == [[6, 6, [6, 6, 6], 12]] * 2
            if KOMBU < (5, 5):  # its worker may take no more tasks after Redis, the broker, was away
                native.end(fleet.processes.pop("worker"))
                fleet.worker(*WORKER)
            for each in both:
                ask(each, "methods")
            assert [answer(each, fleet) for each in both] == [ALL, ALL]
        finally:
            for each in both:
                each.kill()


def ask(process, question):
    process.stdin.write(f"{question}\n")
    process.stdin.flush()


def answer(process, fleet):
    said = process.stdout.readline()
    if not said:
        process.kill()
        logs = (f"{name}: {fleet.log(name)[-3000:]}" for name in fleet.processes)
        pytest.fail("\n".join([process.communicate()[1][-3000:], *logs]))
    return json.loads(said)
