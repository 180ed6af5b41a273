"""See it work, with nothing to install first: real tasks in a real worker, their results through Kafka into views.

    python examples/demo/run.py [--quick] [--keep] [--no-redis] [--tamper]

Starts the embedded stack, a prefork Celery worker and the processors, each a process of its own; lets Celery parse
every source file of Python's standard library; checks every result against a parse in this very process; replays the
log into a second database, and lets a reader that shares no code with the product compare the two. The exit code is 0
only if all of it held.
"""

import argparse
import json
import os
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
from contextlib import ExitStack
from pathlib import Path

import independent
from celery import chord, group
from confluent_kafka import Consumer, TopicPartition
from display import Display

from celery_kafka_backend import codec
from celery_kafka_backend.configure import settings_of, store_options
from celery_kafka_backend.embedded import BANNER, EmbeddedStack, Leashed
from celery_kafka_backend.reader import Reader

HERE = Path(__file__).resolve().parent
NOT_THE_LIBRARY = {"site-packages", "dist-packages"}
PATIENCE_S = 60
BROKEN = {
    "unclosed.py": b"def half(\n",
    "misplaced.py": b"def f():\nreturn 1\n",
    "binary.py": b"x = 1\0\n",
}


def library(quick):
    """Return every source file of Python's standard library; a twelfth of them if it has to be quick."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = sorted(path for path in root.rglob("*.py") if not NOT_THE_LIBRARY & set(path.relative_to(root).parts))
    return [str(path) for path in (found[::12] if quick else found)]


class Demo:
    """One run, in the order of its methods."""

    def __init__(self, stack, display, arguments):
        self.stack = stack
        self.display = display
        self.quick = arguments.quick
        self.tamper = arguments.tamper
        self.live = stack.folder / "view.sqlite"
        self.copy = stack.folder / "replayed.sqlite"
        self.seen = set()
        """States that AsyncResult showed."""
        self.everything = []
        """(task, AsyncResult, what it must be) of every task that was sent."""

    # -- processes -----------------------------------------------------------------------------

    def start(self, processes):
        stack = self.stack
        os.environ["DEMO_CONFIG"] = json.dumps(stack.celery_config)
        self.display.step("The stack, each a process of its own")
        self.display.say(f"  Kafka       {stack.kafka.bootstrap_servers}. {BANNER}")
        if stack.redis is not None:
            self.display.say(f"  Redis       {stack.redis.url}, {stack.redis.binary}: tasks and the primary view")
        else:
            self.display.say("  no Redis    tasks travel through files (kombu's filesystem transport)")
        self.display.say(
            f"  SQLite      {self.live}: {'a second' if stack.redis else 'the only'} view, with the history"
        )
        self.processors = processes.enter_context(self.celery("processors", "pipeline", "run"))
        self.worker = processes.enter_context(
            self.celery(
                "worker", "worker", "-c", "2", "-P", "prefork", "-l", "INFO", "--without-gossip", "--without-mingle"
            )
        )

    def celery(self, name, *words):
        command = [sys.executable, "-m", "celery", "-A", "tasks", *words]
        self.display.say(f"  {name:11} celery -A tasks {' '.join(words)}")
        return Leashed(command, log=self.stack.folder / f"{name}.log", cwd=HERE)

    # -- what it ought to be -------------------------------------------------------------------

    def parse_here(self):
        """Parse every file in this process, so that each result can be checked."""
        import tasks  # noqa: PLC0415 - it reads the environment

        self.tasks = tasks
        broken = self.stack.folder / "broken"
        broken.mkdir()
        for name, source in BROKEN.items():
            (broken / name).write_bytes(source)
        files = library(self.quick) + [str(broken / name) for name in sorted(BROKEN)]
        self.display.step(
            f"Python {sys.version.split()[0]}: {len(files) - len(BROKEN)} source files, and {len(BROKEN)} broken ones"
        )
        self.right, self.wrong = {}, {}
        with self.display.progress("parsed here, for comparison", len(files)) as advance:
            for path in files:
                try:
                    self.right[path] = tasks.counts_of(path)
                except Exception as error:  # noqa: BLE001 - whatever parsing raises is what the task must raise
                    self.wrong[path] = error
                advance()
        self.display.say(f"  {len(self.right)} parse, {len(self.wrong)} do not")

    # -- work ----------------------------------------------------------------------------------

    def send(self, task, *args, must, result=None):
        """Send a task, or note one that was sent; `must` is its result or its exception."""
        result = result or task.delay(*args)
        self.everything.append((task, result, must))
        return result

    def odd_ones(self):
        """One that is revoked while it runs, some that retry until their file is there, and all that fail."""
        tasks, check = self.tasks, self.display.check
        self.display.step("Retries, a revoke, failures")
        self.send(tasks.echo, "ready", must="ready").get(timeout=PATIENCE_S)
        watched = self.send(tasks.watch, 600, must=REVOKED)
        late = {self.stack.folder / f"late{number}.py": path for number, path in enumerate(list(self.right)[:3])}
        retried = group(tasks.count_when_it_is_there.s(str(path)) for path in late).apply_async()
        for result, path in zip(retried, late.values(), strict=True):
            self.send(tasks.count_when_it_is_there, must=self.right[path], result=result)
        self.retried = retried[0]
        self.until(watched, "WATCHING")
        watched.revoke(terminate=True)
        for result in retried:
            self.until(result, "RETRY")
        for path, original in late.items():
            shutil.copyfile(original, path)
        failing = group(tasks.count_definitions.s(path) for path in self.wrong).apply_async()
        for result, error in zip(failing, self.wrong.values(), strict=True):
            self.send(tasks.count_definitions, must=error, result=result)
        retried.join_native(timeout=PATIENCE_S)
        failing.join_native(timeout=PATIENCE_S, propagate=False)
        self.until(watched, "REVOKED")
        check("a running task was revoked", watched.state == "REVOKED")
        check("tasks retried until their file was there", retried.successful())
        self.saved_and_restored("retries", retried)
        self.saved_and_restored("failures", failing)
        retried.delete()
        check("a group that was deleted is gone", self.restored(retried) is None)
        forgotten = tasks.echo.delay("forget me")
        forgotten.get(timeout=PATIENCE_S)
        forgotten.forget()
        check("a result that was forgotten is gone", tasks.app.AsyncResult(forgotten.id).state == "PENDING")

    def until(self, result, state):
        """Wait until AsyncResult shows a state."""
        deadline = time.monotonic() + PATIENCE_S
        while (found := result.state) != state:
            self.seen.add(found)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{result.id} is {found} after {PATIENCE_S} s, not {state}")
            time.sleep(0.01)
        self.seen.add(state)

    def restored(self, saved):
        return self.tasks.app.GroupResult.restore(saved.id)

    def saved_and_restored(self, name, results):
        results.save()
        found = self.restored(results)
        same = found is not None and [one.id for one in found] == [one.id for one in results]
        self.display.check(f"{name}: the group was saved and restored", same, f"{len(results)} tasks")

    def the_library(self):
        """A chord: count every file that parses, and sum the counts up."""
        tasks = self.tasks
        self.display.step("A chord over every file that parses")
        began = time.time()
        header = [tasks.count_definitions.s(path) for path in self.right]
        body = chord(header)(tasks.total.s())
        counted = body.parent
        for result, must in zip(counted, self.right.values(), strict=True):
            self.send(tasks.count_definitions, must=must, result=result)
        with self.display.progress("counted by Celery", len(counted)) as advance:
            patience_s = PATIENCE_S + len(counted)  # a slow machine is not a failure: the bar moves
            counted.join_native(timeout=patience_s, callback=lambda *_: advance())
        expected = tasks.total(list(self.right.values()))
        self.send(tasks.total, must=expected, result=body)
        found = body.get(timeout=PATIENCE_S)
        self.worked = (began, time.time())
        shown = ", ".join(f"{number:,} {name}" for name, number in found.items())
        self.display.check("the chord's body summed up what this process counted", found == expected, shown)
        self.saved_and_restored("the chord's header", counted)

    def latency(self):
        """One task after the other: what `delay().get()` takes, all in all."""
        self.display.step("delay().get(), one after the other")
        self.took_ms = []
        rounds = 50 if self.quick else 200
        for number in range(rounds):
            began = time.perf_counter()
            result = self.tasks.echo.delay(number)
            result.get(timeout=PATIENCE_S)
            self.took_ms.append((time.perf_counter() - began) * 1000)
            self.send(self.tasks.echo, must=number, result=result)
        self.display.say(f"  {rounds} rounds")

    def read_everything(self):
        """Read each result once more through a new AsyncResult, and compare it with what it must be."""
        self.display.step("Every result, read through AsyncResult")
        if self.tamper:
            self.tamper_with_a_result()
        wrong, self.failures = [], []
        for task, sent, must in self.everything:
            result = self.tasks.app.AsyncResult(sent.id)
            self.seen.add(result.state)
            if not as_it_must_be(result, must):
                wrong.append(f"{task.name} {result.id} is {result.state} {result.result!r:.100}, not {must!r:.100}")
            if result.state == "FAILURE":
                self.failures.append(f"{type(result.result).__name__}: {result.result}")
        for line in wrong[:5]:
            self.display.say(f"    {line}", "red")
        self.display.check(
            "every result is what it must be",
            not wrong,
            f"{len(self.everything) - len(wrong)} of {len(self.everything)}",
        )

    def tamper_with_a_result(self):
        """Falsify a result in the primary view, as `--tamper` asks: everything must notice."""
        self.display.say("  --tamper: falsifying one result in the live views")
        victim = next(
            result.id
            for task, result, _ in self.everything
            if task is self.tasks.count_definitions and result.state == "SUCCESS"
        )
        if self.stack.redis is not None:
            import redis  # noqa: PLC0415 - not there on every machine

            with redis.Redis.from_url(self.stack.redis.url) as client:
                key = f"celery-task-meta-{victim}"
                client.set(key, client.get(key).replace(b'"lines": ', b'"lines": 1'))
        with sqlite3.connect(self.live, timeout=10) as connection:
            connection.execute(
                "UPDATE ckb_task SET document = replace(document, '\"lines\": ', '\"lines\": 1') WHERE task_id = ?",
                (victim,),
            )
        connection.close()

    # -- the log ---------------------------------------------------------------------------------

    def timeline(self):
        """One task's whole history, as the log has it."""
        url = self.stack.sqlite_url
        reader = Reader(url, store_options(self.tasks.app, settings_of(self.tasks.app), url))
        events = [codec.decode(value) for value in reader.history(self.retried.id)]
        reader.close()
        rows = [
            (
                event.hlc - events[0].hlc,
                event.kind,
                event.attempt,
                f"{event.role} {event.pid}",
                event.message or (f"{event.runtime_s * 1000:.1f} ms" if event.runtime_s is not None else ""),
            )
            for event in events
        ]
        self.display.table(f"The history of {self.retried.id}", ("ms", "what", "attempt", "who", "detail"), rows)
        kinds = [event.kind for event in events]
        self.display.check(
            "the history tells the retried task from sent to success",
            kinds[:1] == ["sent"] and kinds[-1:] == ["success"] and "retry" in kinds,
        )

    def settle(self):
        """Wait until both the log and the SQLite view are at rest, and check that the log is complete."""
        self.worker.stop()
        prefix = "celery"
        consumer = Consumer({"bootstrap.servers": self.stack.kafka.bootstrap_servers, "group.id": "demo"})
        try:
            deadline = time.monotonic() + PATIENCE_S
            before = None
            while True:
                marks = {
                    (topic, number): consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=10)
                    for topic in (f"{prefix}.task-events", f"{prefix}.chords", f"{prefix}.dead-letters")
                    for number in consumer.list_topics(topic, timeout=10).topics[topic].partitions
                }
                folded = self.positions()
                behind = {
                    at: high - folded.get(at, 0)
                    for at, (_, high) in marks.items()
                    if high > folded.get(at, 0) and not at[0].endswith("dead-letters")
                }
                if not behind and marks == before:
                    break
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the SQLite view is behind the log: {behind}")
                before = marks
                time.sleep(0.25)
        finally:
            consumer.close()
        low = {at: first for at, (first, _) in marks.items() if first}
        self.display.check("the log still holds its first event", not low, "" if not low else f"its start moved: {low}")
        dead = sum(high - first for (topic, _), (first, high) in marks.items() if topic.endswith("dead-letters"))
        self.display.check("no event was given up", dead == 0, f"{dead} dead letters" if dead else "")

    def positions(self):
        connection = sqlite3.connect(f"{self.live.as_uri()}?mode=ro", uri=True)
        try:
            rows = connection.execute("SELECT topic, partition, next FROM ckb_position").fetchall()
        finally:
            connection.close()
        return {(topic, partition): following for topic, partition, following in rows}

    def replay(self):
        """Replay the log into a new file; a stranger compares it with the live view, then with a corrupted copy."""
        self.display.step("Replay into a new database")
        command = [
            sys.executable,
            "-m",
            "celery",
            "-A",
            "tasks",
            "pipeline",
            "replay",
            "--to",
            f"sqlite:///{self.copy}",
        ]
        self.display.say(f"  celery -A tasks {' '.join(command[5:])}")
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        if done.returncode:
            self.display.say(done.stdout + done.stderr, "red")
        self.display.check("the log was replayed", done.returncode == 0)
        rows, values, differences = independent.compare(self.live, self.copy)
        for line in differences[:5]:
            self.display.say(f"    {line}", "red")
        self.display.check(
            "every row and column is as in the live view", rows and not differences,
            f"{rows:,} rows, {values:,} values, {len(differences)} differences",
        )  # fmt: skip
        connection = sqlite3.connect(self.copy)
        with connection:
            victim = connection.execute("SELECT min(task_id) FROM celery_taskmeta WHERE status = 'SUCCESS'").fetchone()[
                0
            ]
            connection.execute("UPDATE celery_taskmeta SET status = 'FAILURE' WHERE task_id = ?", (victim,))
        connection.close()
        _, _, after = independent.compare(self.live, self.copy)
        new = [line for line in after if line not in differences]
        self.display.check(
            "one row corrupted on purpose is noticed", len(new) == 1 and victim in new[0], "; ".join(new)
        )

    def table(self):
        """What happened, in figures."""
        connection = sqlite3.connect(f"{self.live.as_uri()}?mode=ro", uri=True)
        kinds = dict(connection.execute("SELECT kind, count(*) FROM ckb_history GROUP BY kind ORDER BY count(*) DESC"))
        began, ended = self.worked
        during = connection.execute(
            "SELECT count(*) FROM ckb_history WHERE at BETWEEN ? AND ?", (began * 1000, ended * 1000)
        ).fetchone()[0]
        ids = connection.execute("SELECT count(DISTINCT task_id) FROM ckb_history WHERE kind = 'sent'").fetchone()[0]
        connection.close()
        self.took_ms.sort()
        p99 = self.took_ms[min(len(self.took_ms) - 1, int(len(self.took_ms) * 0.99))]
        rows = [
            ("tasks", ids),
            ("events", f"{sum(kinds.values())}: " + ", ".join(f"{number} {kind}" for kind, number in kinds.items())),
            ("states seen", ", ".join(sorted(self.seen))),
            (
                "failures",
                "\n".join(
                    f"{self.failures.count(text)} times {text}" if self.failures.count(text) > 1 else text
                    for text in dict.fromkeys(self.failures)
                ),
            ),
            (
                "events/s",
                f"{during / (ended - began):,.0f} while the chord ran, {ended - began:.1f} s; the worker's two children set the pace",
            ),
            ("delay().get()", f"p50 {statistics.median(self.took_ms):.1f} ms, p99 {p99:.1f} ms"),
        ]
        self.display.table("In short", ("", ""), rows)
        sent_all = ids == len(self.everything) + 1  # the forgotten one is no longer to be read
        self.display.check(
            "the history knows every task that was sent", sent_all, f"{ids} of {len(self.everything) + 1}"
        )
        self.display.check("all states were seen", {"RETRY", "SUCCESS", "FAILURE", "REVOKED", "WATCHING"} <= self.seen)

    def run(self, processes):
        self.start(processes)
        self.parse_here()
        self.odd_ones()
        self.the_library()
        self.latency()
        self.read_everything()
        self.settle()
        self.timeline()
        self.table()
        self.replay()

    def last_words(self, error):
        """Where it broke, and what the processes said at last, for whoever has to find out why."""
        (here, *_) = (one for one in reversed(traceback.extract_tb(error.__traceback__)) if one.filename == __file__)
        self.display.say(
            f"\n{type(error).__name__}: {error}\n  in {here.name}, line {here.lineno}: {here.line}", "bold red"
        )
        for process in (self.worker, self.processors):
            ended = "" if process.code is None else f" (it ended, exit code {process.code})"
            self.display.say(f"\n--- the end of {process.log}{ended}", "bold")
            self.display.say(process.tail())


REVOKED = object()


def as_it_must_be(result, must):
    """Whether an AsyncResult is what it must be: a value, an exception of one kind and text, or revoked."""
    if must is REVOKED:
        return result.state == "REVOKED"
    if isinstance(must, Exception):
        return result.state == "FAILURE" and type(result.result) is type(must) and str(result.result) == str(must)
    return result.state == "SUCCESS" and result.result == must


def send_again(dropped):
    """What stops us may arrive inside a finalizer, and there the interpreter drops it: a moment later, once more."""
    number = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}.get(dropped.exc_type)
    if number is None:
        sys.__unraisablehook__(dropped)
    else:
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a twelfth of the files; every check all the same")
    parser.add_argument("--keep", action="store_true", help="leave databases and logs where they are, and say where")
    parser.add_argument("--no-redis", action="store_true", help="as on a machine without Redis: files, and SQLite")
    parser.add_argument(
        "--tamper", action="store_true", help="falsify one result in the live views: the demo must fail"
    )
    arguments = parser.parse_args()
    # As Ctrl-C: everything that was started ends before we do.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.unraisablehook = send_again
    display = Display()
    began = time.monotonic()
    try:
        with EmbeddedStack(redis=not arguments.no_redis, keep=arguments.keep) as stack, ExitStack() as processes:
            demo = Demo(stack, display, arguments)
            try:
                demo.run(processes)
            except Exception as error:  # noqa: BLE001 - shown, with what may explain it
                demo.last_words(error)
                return 1
        held = display.verdict()
        if arguments.keep:
            display.say(f"kept: {stack.folder}")
        display.say(f"{time.monotonic() - began:.0f} s")
    except KeyboardInterrupt:
        display.say("interrupted; everything that was started has ended")
        return 130
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
