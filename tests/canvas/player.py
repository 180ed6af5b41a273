"""Plays programs against one backend, in a process of its own, and says what came of them.

A line of JSON on standard input is a batch, a line on standard output its answers.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor

import redis
from celery.result import GroupResult, allow_join_result, result_from_tuple

from tests.canvas.answers import has_none
from tests.canvas.app import FOLDER, app, begin
from tests.canvas.building import built
from tests.faults import journal

QUIET_S = 1.0
PATIENCE_S = 60.0
UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
VARIES = re.compile(r"Job: \d+|0x[0-9a-f]+")


def play(programs, expected):
    """Return the answers of some programs, by their seeds."""
    sent = {seed: _send(program) for seed, program in programs.items()}
    _rest()
    for seed, program in programs.items():
        if program["how"] == "again" and not isinstance(sent[seed], str) and sent[seed][0].ready():
            sent[seed].append(sent[seed][1].apply_async())
        if not isinstance(sent[seed], str):
            sent[seed] = [one for one in sent[seed] if hasattr(one, "as_tuple")]
    _rest()
    soon = time.monotonic() + 5.0
    deadline = time.monotonic() + PATIENCE_S if expected else soon
    with ThreadPoolExecutor(16) as pool:
        list(
            pool.map(
                lambda seed: _wait(sent[seed], soon if expected and has_none(expected[seed]) else deadline, expected),
                programs,
            )
        )
    wanted = {seed: Counter(answer["ran"]) for seed, answer in (expected or {}).items()}
    while True:
        ran, labels = _journal()
        missing = [seed for seed in wanted if wanted[seed] - Counter(_shown(seed, ran, labels))]
        if not missing or time.monotonic() > deadline:
            break
        time.sleep(0.3)
    _rest()
    ran, labels = _journal()
    return {seed: _answer(seed, sent[seed], ran, labels) for seed in programs}


def _send(program):
    if program["revoked"]:
        app.control.revoke(program["revoked"], reply=True, timeout=2.0)
    how, spec = program["how"], program["canvas"]
    try:
        if how == "inside":
            told = begin.delay(spec).get(timeout=PATIENCE_S)
            return [result_from_tuple(json.loads(json.dumps(told)), app=app)]
        if (
            how == "call"
            and spec["kind"] == "chord"
            and not set(spec) & {"clone", "by json", "link", "link_error", "stamps"}
        ):
            from celery import chord  # noqa: PLC0415 - after the app

            return [chord(built(one) for one in spec["header"])(built(spec["body"]))]
        canvas = built(spec)
        if how == "delay":
            return [canvas.delay()]
        if how == "twice":
            return [canvas.apply_async(), canvas.apply_async()]
        if how in {"frozen", "again"}:
            canvas.freeze()
            return [canvas.apply_async(), *([canvas] if how == "again" else [])]
        return [canvas.apply_async()]
    except Exception as exc:  # noqa: BLE001 - an answer, too
        return f"{type(exc).__name__}: {exc}"


def _rest():
    """Wait until no task is queued or running, and nothing is written."""
    queue = redis.Redis.from_url(app.conf.broker_url)
    before, since = None, time.monotonic()
    begun = since
    while True:
        names = [name for name in queue.scan_iter() if not name.startswith((b"_kombu", b"unacked_mutex"))]
        busy = [name for name in names if name == b"unacked" or name.startswith((b"celery", b"aside"))]
        busy = [name for name in busy if b"pidbox" not in name and b"task-meta" not in name]
        size = sum(path.stat().st_size for path in FOLDER.glob("*.jsonl"))
        if time.monotonic() - begun > 120:
            print(f"still busy: {busy} {queue.hgetall('unacked')}", file=sys.stderr, flush=True)
            return
        if busy or size != before:
            before, since = size, time.monotonic()
        elif time.monotonic() - since > QUIET_S:
            return
        time.sleep(0.1)


def _wait(results, deadline, is_ours):
    if isinstance(results, str):
        return
    for result in results:
        if is_ours:  # Celery's own hangs where many threads wait
            with contextlib.suppress(Exception):
                result.get(timeout=max(deadline - time.monotonic(), 0.1), propagate=False)
        while not _all_ready(result) and time.monotonic() < deadline:
            time.sleep(0.2)


def _all_ready(result):
    while result is not None:
        if not result.ready():
            return False
        result = result.parent
    return True


def _journal():
    lines = list(journal.read(FOLDER, "canvas"))
    # One that was replaced keeps its id: its own label, which was drawn first, is the one that counts.
    own_last = sorted(lines, key=lambda line: int(line["label"].partition(".")[2]), reverse=True)
    labels = {line["id"]: line["label"] for line in own_last if line.get("id")}
    by_seed = defaultdict(list)
    for line in lines:
        by_seed[line["label"].partition(".")[0][1:]].append(line)
    return by_seed, labels


def _shown(seed, ran, labels):
    shown = []
    for line in ran[seed]:
        facts = {
            name: line.get(name)
            for name in ("what", "label", "got", "exc", "queue", "priority", "mine", "stamps", "attempt")
        }
        facts["failed"] = labels.get(line.get("failed"), "?") if line["what"] != "ran" else None
        key = _masked(json.dumps(facts, sort_keys=True), labels)
        shown.append(key)
    return shown


def _masked(text, labels):
    text = UUID.sub(lambda found: f"<{labels.get(found[0], '?')}>", text)
    return VARIES.sub("…", text)


def _answer(seed, results, ran, labels):
    if isinstance(results, str):
        return {"sent": _masked(results, labels), "trees": [], "gets": [], "docs": {}, "ran": _shown(seed, ran, labels)}
    ids = {line["id"]: line["label"] for line in ran[seed] if line.get("id")}
    docs = defaultdict(list)
    for task_id, label in ids.items():
        docs[label].append(_document(task_id, labels))
    trees = [_tree(result, labels) for result in results]
    return {
        "sent": "",
        "trees": trees,
        "gets": [_get(result, tree, labels) for result, tree in zip(results, trees, strict=True)],
        "docs": {label: sorted(found) for label, found in docs.items()},
        "ran": _shown(seed, ran, labels),
    }


def _document(task_id, labels):
    meta = app.AsyncResult(task_id)._get_task_meta()
    return _masked(f"{meta['status']} {_value(meta.get('result'))}", labels)


def _value(value):
    return f"{type(value).__name__}({value})" if isinstance(value, BaseException) else json.dumps(value, default=repr)


def _tree(result, labels):
    if result is None:
        return None
    if isinstance(result, GroupResult):
        made = {"group": [_tree(one, labels) for one in result.results]}
        made["counts"] = [result.completed_count(), result.successful(), result.failed(), result.ready()]
    else:
        made = {"task": labels.get(result.id, "?"), "doc": _document(result.id, labels)}
    if result.parent is not None:
        made["parent"] = _tree(result.parent, labels)
    return made


def _get(result, tree, labels):
    if "PENDING" in json.dumps(tree):  # then Celery's own may wait without end, whatever the timeout
        return "nothing"
    try:
        with allow_join_result():
            return _masked(_value(result.get(timeout=2)), labels)
    except Exception as exc:  # noqa: BLE001 - an answer, too
        return _masked(_value(exc), labels)


def main():
    for line in sys.stdin:
        asked = json.loads(line)
        print("ANSWER " + json.dumps(play(asked["programs"], asked["expected"])), flush=True)


if __name__ == "__main__":
    main()
