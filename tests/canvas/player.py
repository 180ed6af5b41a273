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
from celery.backends.redis import RedisBackend
from celery.result import GroupResult, allow_join_result, result_from_tuple

from tests.canvas.answers import has_none
from tests.canvas.app import FOLDER, app, begin
from tests.canvas.building import built
from tests.faults import journal

QUIET_S = 1.0
PATIENCE_S = 60.0
UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
VARIES = re.compile(r"Job: \d+|0x[0-9a-f]+")
DEPENDENCY = re.compile(rf"Dependency ({UUID.pattern}) raised ")


def play(programs, expected):
    """Return the answers of some programs, by their seeds."""
    sent = {seed: _send(program) for seed, program in programs.items()}
    _rest()
    for seed, program in programs.items():
        if (
            program["how"] == "again"
            and not isinstance(sent[seed], str)
            and _ended(sent[seed][0], expected and expected[seed])
        ):
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
        missing = [seed for seed in wanted if wanted[seed] - Counter(_shown(ran[seed], Names(ran[seed], labels)))]
        if not missing or time.monotonic() > deadline:
            break
        time.sleep(0.3)
    _rest()
    ran, labels = _journal()
    return {seed: _answer(sent[seed], ran[seed], Names(ran[seed], labels)) for seed in programs}


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


def _ended(result, expected):
    """Whether it has ended; where it has on Redis, it is waited for."""
    if expected and len(expected["trees"]) > 1:
        _wait([result], time.monotonic() + PATIENCE_S, is_ours=True)
    return result.ready()


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


class Names:
    """Labels instead of ids, and of what Celery leaves to chance only that it does.

    Args:
        lines: The journal of one program.
        labels: By task id, of all programs.
    """

    def __init__(self, lines, labels):
        self._labels = labels
        calls, places = defaultdict(set), defaultdict(set)
        for line in lines:
            if line["what"] == "ran" and line.get("id"):
                calls[line["id"], line["label"]].add(json.dumps(line["got"]))
                places[line["group"], line["index"]].add(line["id"])
        # A group behind a group in a chain is called by each of the first one's members, under the same ids.
        self._called_otherwise = {label for (_, label), got in calls.items() if len(got) > 1}
        # In the header of a generator the members of a group are counted from 0 again: which of two comes first, their ids decide.
        self._ties = {
            task_id: ", ".join(sorted(self.of(one) for one in ids))
            for (group, _), ids in places.items()
            if group and len(ids) > 1
            for task_id in ids
        }

        self._tied = {self.of(task_id): tied for task_id, tied in self._ties.items()}

    def of(self, task_id):
        return self._labels.get(task_id, "?")

    def in_text(self, text):
        return VARIES.sub("…", UUID.sub(lambda found: f"<{self.of(found[0])}>", text))

    def in_error(self, text):
        """As `in_text`, of an exception's text."""
        for found in DEPENDENCY.finditer(text):
            if found[1] in self._ties:
                text = f"{text[: found.start()]}Dependency <one of {self._ties[found[1]]}> raised …"
                break
        return self.in_text(text)

    def in_value(self, value):
        """Without what a task returned that was called in several ways, and results in one order where chance decides it."""
        if not isinstance(value, (list, tuple)):
            return value
        if _label(value) in self._called_otherwise:
            return [value[0], "…"]
        found = [self.in_value(one) for one in value]
        tied = [self._tied.get(_label(one)) for one in value]
        if any(tied.count(each) > 1 for each in tied if each is not None):
            found.sort(key=json.dumps)
        return found

    def value(self, value):
        """The text of a result."""
        if isinstance(value, BaseException):
            return f"{type(value).__name__}({self.in_error(str(value))})"
        return self.in_text(json.dumps(self.in_value(value), default=repr))


def _label(value):
    """Whose result that is: `work` returns its label first."""
    return value[0] if isinstance(value, (list, tuple)) and value and isinstance(value[0], str) else None


def _shown(lines, names):
    shown = []
    for line in lines:
        facts = {name: line.get(name) for name in ("what", "label", "queue", "priority", "mine", "stamps", "attempt")}
        facts["failed"] = names.of(line.get("failed")) if line["what"] != "ran" else None
        facts["exc"] = line.get("exc") and [names.in_error(text) for text in line["exc"]]
        facts["got"] = line.get("got") and names.in_value(line["got"])
        shown.append(names.in_text(json.dumps(facts, sort_keys=True)))
    return shown


def _answer(results, lines, names):
    if isinstance(results, str):
        return {
            "sent": names.in_text(results), "trees": [], "gets": [], "docs": {}, "ran": _shown(lines, names), "open": 0,
        }  # fmt: skip
    docs = defaultdict(list)
    for task_id, label in {line["id"]: line["label"] for line in lines if line.get("id")}.items():
        docs[label].append(_document(task_id, names))
    trees = [_tree(result, names) for result in results]
    return {
        "sent": "",
        "trees": trees,
        "gets": [_get(result, tree, names) for result, tree in zip(results, trees, strict=True)],
        "docs": {label: sorted(found) for label, found in docs.items()},
        "ran": _shown(lines, names),
        "open": _open_chords({line["group"] for line in lines if line.get("group")}.union(*map(_groups, results))),
    }


def _groups(result):
    if result is None:
        return set()
    own = {result.id}.union(*map(_groups, result.results)) if isinstance(result, GroupResult) else set()
    return own | _groups(result.parent)


def _open_chords(groups):
    """How many chords Celery's Redis backend still waits for: their size goes when they are decided."""
    if not isinstance(app.backend, RedisBackend):
        return 0
    return sum(app.backend.client.exists(app.backend.get_key_for_group(one, ".s")) for one in groups)


def _document(task_id, names):
    meta = app.AsyncResult(task_id)._get_task_meta()
    return f"{meta['status']} {names.value(meta.get('result'))}"


def _tree(result, names):
    if result is None:
        return None
    if isinstance(result, GroupResult):
        made = {"group": [_tree(one, names) for one in result.results]}
        made["counts"] = [result.completed_count(), result.successful(), result.failed(), result.ready()]
    else:
        made = {"task": names.of(result.id), "doc": _document(result.id, names)}
    if result.parent is not None:
        made["parent"] = _tree(result.parent, names)
    return made


def _get(result, tree, names):
    if "PENDING" in json.dumps(tree):  # then Celery's own may wait without end, whatever the timeout
        return "nothing"
    try:
        with allow_join_result():
            return names.value(result.get(timeout=2))
    except Exception as exc:  # noqa: BLE001 - an answer, too
        return names.value(exc)


def main():
    for line in sys.stdin:
        asked = json.loads(line)
        print("ANSWER " + json.dumps(play(asked["programs"], asked["expected"])), flush=True)


if __name__ == "__main__":
    main()
