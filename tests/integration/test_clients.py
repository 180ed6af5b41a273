"""Programs that send tasks and read results, in every kind of process: none loses what it sent, none hangs at its end."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from celery_kafka_backend import events
from tests.patience import PATIENCE_S
from tests.services import native, ports

pytestmark = [pytest.mark.kafka, pytest.mark.redis]


def script(fleet, text, *, patch=""):
    """Run a script to its end, and return what it printed as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", f"{patch}\n{textwrap.dedent(text)}"],
        env=fleet.environment,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# -- scripts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("last_words", ["", "sys.exit(0)", "raise SystemExit"])
def test_a_script_that_ends_at_once_has_told_what_it_sent(fleet, last_words):
    ids = script(
        fleet,
        f"""
        import json, sys
        import fleet_app
        print(json.dumps([fleet_app.add.delay(i, i).id for i in range(50)]), flush=True)
        {last_words}
        """,
    )
    for task_id in ids:
        fleet.history(task_id, events.SENT, events.SUCCESS)


def test_a_script_s_forks_each_tell_what_they_sent(fleet):
    ids = script(
        fleet,
        """
        import json, multiprocessing
        import fleet_app

        def send(number):
            result = fleet_app.add.delay(number, 1)
            assert result.get(timeout=180) == number + 1
            return result.id

        first = send(0)
        with multiprocessing.get_context("fork").Pool(3) as pool:
            others = pool.map(send, range(12))
            pool.close()
            pool.join()
        print(json.dumps([first, send(1), *others]))
        """,
    )
    assert len(set(ids)) == 14
    for task_id in ids:
        fleet.history(task_id, events.SENT, events.SUCCESS)


PATCH = {
    "threads": "",
    "gevent": "from gevent import monkey; monkey.patch_all()",
    "eventlet": "import eventlet; eventlet.monkey_patch()",
}


@pytest.mark.parametrize("kind", sorted(PATCH))
def test_many_waiters_of_one_process_all_hear(fleet, kind):
    found = script(
        fleet,
        """
        import json, threading, time
        from celery import chord, group
        import fleet_app

        heard, ids, ticks = [], [], 0

        def ask(number):
            result = fleet_app.add.delay(number, number)
            heard.append(result.get(timeout=180) == 2 * number)
            ids.append(result.id)

        def ask_groups(number):
            members = [fleet_app.add.s(i, number) for i in range(5)]
            heard.append(group(members).apply_async().get(timeout=180) == [i + number for i in range(5)])
            heard.append(chord(members)(fleet_app.total.s()).get(timeout=180) == 10 + 5 * number)

        def fail(number):
            try:
                fleet_app.fail.delay(str(number)).get(timeout=180)
            except ValueError as exc:
                heard.append(str(exc) == str(number))

        waiting = [threading.Thread(target=work, args=(n,)) for n in range(10) for work in (ask, ask_groups, fail)]
        for one in waiting:
            one.start()
        nap = fleet_app.nap.delay(3)
        while any(one.is_alive() for one in waiting) or not nap.ready():
            time.sleep(0.01)
            ticks += 1
        print(json.dumps({"heard": heard, "ids": ids, "ticks": ticks}))
        """,
        patch=PATCH[kind],
    )
    assert found["heard"] == [True] * 40
    assert found["ticks"] > 10
    for task_id in found["ids"]:
        fleet.history(task_id, events.SENT, events.SUCCESS)


# -- servers that fork -------------------------------------------------------------------------------

SERVERS = {
    "gunicorn --preload": ["gunicorn", "--preload", "-w", "2", "-b", "127.0.0.1:{port}", "web_app:application"],
    "gunicorn --preload, threads": [
        *("gunicorn", "--preload", "-w", "1", "--threads", "4", "-b", "127.0.0.1:{port}", "web_app:application"),
    ],
    "gunicorn, gevent": ["gunicorn", "-k", "gevent", "-w", "2", "-b", "127.0.0.1:{port}", "web_app:application"],
    "uwsgi": [
        *("uwsgi", "--master", "--need-app", "--die-on-term", "--http-socket", "127.0.0.1:{port}"),
        *("--processes", "2", "--module", "web_app:application"),
    ],
    "uwsgi --enable-threads": [
        *("uwsgi", "--master", "--need-app", "--die-on-term", "--http-socket", "127.0.0.1:{port}"),
        *("--processes", "2", "--enable-threads", "--module", "web_app:application"),
    ],
}
UWSGI = "import sys, pyuwsgi; sys.argv[0] = 'uwsgi'; pyuwsgi.run()"


def get(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=PATIENCE_S) as answer:
        return json.loads(answer.read())


def until_it_answers(port, process, log):
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return get(port, "/before")
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)


@pytest.mark.parametrize("server", SERVERS)
def test_a_server_that_forked_after_it_had_sent_a_task(fleet, tmp_path, server):
    (port,) = ports.free(1)
    program, *arguments = [part.format(port=port) for part in SERVERS[server]]
    command = [sys.executable, "-m", program, *arguments]
    if program == "uwsgi":
        command = [sys.executable, "-c", UWSGI, *arguments, "--pythonpath", str(Path(__file__).parent)]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = native.popen(command, output=output, env=fleet.environment, cwd=Path(__file__).parent)
    try:
        assert until_it_answers(port, process, log)["result"] == 42
        with ThreadPoolExecutor(4) as clients:
            ran = list(clients.map(lambda _: get(port, "/run"), range(24)))
            sent = list(clients.map(lambda _: get(port, "/send"), range(24)))
        assert [one["result"] for one in ran] == [3] * 24
        # Told while the server still runs: nobody may have to wait for the process to send more, or to end.
        for one in ran + sent:
            said = fleet.history(one["id"], events.SENT, events.SUCCESS)
            assert one["pid"] in [event.pid for event in said if event.kind == events.SENT]
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)
    finally:
        native.end(process)
    assert "Traceback" not in log.read_text()


# -- Django's development server -----------------------------------------------------------------------

SITE = """
    import os, sys
    sys.path.insert(0, {tests!r})
    from django.conf import settings
    from django.http import JsonResponse
    from django.urls import path
    import fleet_app

    def run(request):
        result = fleet_app.add.delay(1, 2)
        return JsonResponse({{"id": result.id, "result": result.get(timeout=180), "pid": os.getpid(), "version": {version}}})

    urlpatterns = [path("before", run)]
    settings.configure(DEBUG=True, ROOT_URLCONF=__name__, SECRET_KEY="-", ALLOWED_HOSTS=["*"])

    if __name__ == "__main__":
        from django.core.management import execute_from_command_line
        execute_from_command_line(sys.argv)
"""


def test_django_s_autoreloader(fleet, tmp_path):
    (port,) = ports.free(1)
    site, log = tmp_path / f"site_{secrets.token_hex(4)}.py", tmp_path / "log"

    def write(version):
        site.write_text(textwrap.dedent(SITE).format(tests=str(Path(__file__).parent), version=version))

    write(1)
    with log.open("wb") as output:
        process = native.popen(
            [sys.executable, str(site), "runserver", f"127.0.0.1:{port}"],
            output=output, env={**fleet.environment, "PYTHONUNBUFFERED": "1"}, cwd=tmp_path,
        )  # fmt: skip
    try:
        first = until_it_answers(port, process, log)
        assert first["result"] == 3
        os.utime(site, (time.time() - 60, time.time() - 60))
        write(2)
        deadline = time.monotonic() + PATIENCE_S
        while (again := until_it_answers(port, process, log))["version"] != 2:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        assert again["result"] == 3
        assert again["pid"] != first["pid"]
        for one in (first, again):
            fleet.history(one["id"], events.SENT, events.SUCCESS)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(PATIENCE_S)
    finally:
        native.end(process)
    assert "Traceback" not in log.read_text()
