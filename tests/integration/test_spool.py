"""The spool's file, hurt in every way a file is: no Kafka here; test_detour.py has that."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from celery_kafka_backend.errors import SpoolError
from celery_kafka_backend.producer.publisher import Record
from celery_kafka_backend.producer.salvage import adopt
from celery_kafka_backend.producer.spool import DAMAGED, Spool
from tests.patience import PATIENCE_S

LIMIT = 1 << 24


def event(number, size=100):
    return Record("events", f"task-{number}".encode(), b"%d" % number + b"." * size, [("k", b"success")])


def part(number):
    return Record("chords", b"key", b"%d" % number, [], f"group-{number}")


def numbers(spool):
    """Everything in the spool, in order."""
    found, after = [], 0
    while batch := spool.oldest(after):
        found += [int(one.record.value.rstrip(b".")) for one in batch]
        after = batch[-1].seq
    return found


@pytest.fixture
def spool(tmp_path):
    return Spool(tmp_path / "new" / "s.spool", LIMIT)


def child(work):
    """Run something in a fork, and return its pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_records_come_back_as_they_were_in_the_order_of_arrival(spool):
    assert spool.empty()
    given = [part(0), event(0), event(1)]
    for one in given:
        spool.append(one)
    assert not spool.empty()
    assert [one.record for one in spool.oldest()] == given
    assert [one.record for one in spool.oldest(after=spool.oldest()[0].seq)] == given[1:]


def test_what_was_read_from_a_file_that_is_gone_is_not_removed_from_the_next(spool):
    """Whoever drains waits for Kafka between the two; meanwhile a damaged file may have been moved aside."""
    spool.append(event(1))
    batch = spool.oldest()
    spool.retire()
    spool.append(event(2))
    spool.remove([one.seq for one in batch])
    spool.set_aside(batch[0].seq, "too large")
    assert numbers(spool) == [2]


def test_looking_at_an_emptied_spool_makes_no_file(spool, monkeypatch):
    monkeypatch.setattr(type(spool.path), "exists", lambda _path: next(there, False))
    there = iter([True])  # it was there a moment ago
    assert spool.oldest() == []
    monkeypatch.undo()
    assert spool.state().records == 0
    spool.remove([1])
    assert not spool.path.exists()


def test_a_batch_is_bounded_by_number_and_bytes_but_never_empty(spool):
    for number in range(5):
        spool.append(event(number, size=1000))
    assert len(spool.oldest(most=2)) == 2
    assert len(spool.oldest(most_bytes=2500)) == 3
    assert len(spool.oldest(most_bytes=1)) == 1


def test_what_is_removed_is_gone_and_an_empty_spool_leaves_no_file(spool):
    for number in range(3):
        spool.append(event(number))
    spool.remove([spool.oldest()[1].seq])
    assert numbers(spool) == [0, 2]
    spool.remove([one.seq for one in spool.oldest()])
    assert spool.empty()
    assert not spool.path.exists()
    spool.append(event(7))
    assert numbers(spool) == [7]


def test_the_events_of_a_task_are_found_without_its_chord_s_part(spool):
    spool.append(part(3))
    spool.append(event(3))
    spool.append(event(4))
    assert spool.holding("task-3") == [event(3)]
    assert spool.holding("group-3") == []
    assert spool.holding("unknown") == []


def test_the_state_tells_how_many_how_old_how_large_and_whose(spool):
    before = time.time_ns() // 1_000_000
    assert spool.state().records == 0
    spool.append(event(1))
    assert ended(child(lambda: spool.append(event(2)))) == 0
    spool.append(event(3))
    spool.set_aside(spool.oldest()[0].seq, "too large")
    state = spool.state()
    assert state.records == 2
    assert state.aside == {"too large": 1}
    assert state.pids[os.getpid()] == 2
    assert len(state.pids) == 2
    assert 0 < state.size <= state.limit == LIMIT
    assert before <= state.oldest_ms <= time.time_ns() // 1_000_000


def test_what_is_set_aside_is_not_drained_until_it_is_taken_back(spool):
    spool.append(event(1))
    spool.append(event(2))
    spool.set_aside(spool.oldest()[0].seq, "too large")
    assert numbers(spool) == [2]
    assert spool.take_back() == 1
    assert numbers(spool) == [1, 2]


def test_a_full_spool_refuses_names_its_setting_and_takes_again_when_there_is_room(tmp_path):
    limit = 1 << 20
    spool = Spool(tmp_path / "s.spool", limit)
    taken = 0
    refusal = ""
    while not refusal:
        try:
            spool.append(event(taken, size=10_000))
            taken += 1
        except SpoolError as exc:
            refusal = str(exc)
    assert refusal == f"the spool {spool.path} is full: spool_max_bytes = {limit}"
    assert taken > 50
    assert numbers(spool) == list(range(taken))
    assert sum(one.stat().st_size for one in spool.path.parent.iterdir()) < 1.5 * limit
    spool.remove([one.seq for one in spool.oldest(most=3)])
    spool.append(event(taken))
    assert numbers(spool) == list(range(3, taken + 1))


def test_eight_processes_and_a_drainer_lose_nothing_and_keep_each_one_s_order(spool):
    each = 60

    def appends(process):
        for number in range(each):
            spool.append(event(process * 1000 + number))

    pids = [child(lambda process=process: appends(process)) for process in range(8)]
    seen = []
    while len(seen) < 8 * each:
        batch = spool.oldest(most=7)
        seen += [int(one.record.value.rstrip(b".")) for one in batch]
        spool.remove([one.seq for one in batch])
    assert [ended(pid) for pid in pids] == [0] * 8
    for process in range(8):
        assert [one % 1000 for one in seen if one // 1000 == process] == list(range(each))
    assert spool.empty()


def test_a_process_may_fork_while_its_threads_use_the_spool(spool):
    stop = threading.Event()
    seen = set()

    def drained():
        batch = spool.oldest()
        seen.update(int(one.record.value.rstrip(b".")) for one in batch)
        spool.remove([one.seq for one in batch])

    def busy():
        while not stop.is_set():
            spool.append(event(0))
            drained()

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for number in range(30):
            assert ended(child(lambda number=number: spool.append(event(number + 1)))) == 0
    finally:
        stop.set()
        thread.join()
    drained()
    assert seen == set(range(31))


APPENDER = """
import sys
from pathlib import Path
from celery_kafka_backend.producer.publisher import Record
from celery_kafka_backend.producer.spool import Spool
spool = Spool(Path(sys.argv[1]), 1 << 30)
number = int(sys.argv[2])
while True:
    spool.append(Record("events", b"task", b"%d" % number + b"." * 20_000))
    print(number, flush=True)
    number += 1
"""


def test_kill_9_in_mid_write_loses_nothing_that_was_acknowledged(spool):
    acknowledged = []
    for attempt in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", APPENDER, str(spool.path), str(attempt * 1000)], stdout=subprocess.PIPE, text=True
        )
        acknowledged.append(int(process.stdout.readline()))
        time.sleep(0.013 * attempt)
        process.send_signal(signal.SIGKILL)
        acknowledged += [int(line) for line in process.stdout.read().split()]
        process.wait()
        process.stdout.close()
    found = numbers(spool)
    assert set(acknowledged) <= set(found)
    assert len(found) - len(acknowledged) <= 12  # on disk, but killed before it could say so
    assert found == sorted(found)


def filled(spool, n=400):
    """Fill it, and leave no connection open whose cache would hide what happens to the file."""
    for number in range(n):
        spool.append(event(number, size=1000))
    assert ended(child(lambda: None)) == 0
    return n


def wholes(spool):
    """What is left after a drain has taken over what was moved aside."""
    for file in spool.retired():
        adopt(spool, file)
    return numbers(spool)


def test_a_truncated_file_gives_what_is_left_and_a_new_one_goes_on(spool, caplog):
    n = filled(spool)
    os.truncate(spool.path, spool.path.stat().st_size * 2 // 3 // 4096 * 4096)
    for number in range(n, n + 5):
        spool.append(event(number))
    found = wholes(spool)
    assert set(range(n, n + 5)) <= set(found)
    assert len(set(found)) > n / 3
    assert "damaged" in caplog.text
    assert any(one.name.endswith(".read") for one in spool.path.parent.iterdir())  # kept for whoever wants to look
    assert spool.retired() == []


def test_a_file_with_a_hole_gives_both_sides_of_it(spool):
    n = filled(spool)
    with spool.path.open("r+b") as file:
        file.seek(spool.path.stat().st_size // 2 // 4096 * 4096)
        file.write(os.urandom(8192))
    assert not spool.empty()
    spool.retire()
    found = wholes(spool)
    assert 0 in found
    assert n - 1 in found
    assert n - 60 <= len(found) < n


def test_a_file_that_is_no_database_is_moved_aside(spool):
    spool.append(event(1))
    spool.path.write_bytes(os.urandom(20_000))
    spool.append(event(2))
    assert wholes(spool) == [2]
    assert [one for one in spool.path.parent.iterdir() if one.name.endswith(".read")]


def test_a_file_cut_to_nothing_is_a_new_spool(spool):
    filled(spool, 10)
    os.truncate(spool.path, 0)
    spool.append(event(99))
    assert numbers(spool) == [99]


def test_a_changed_byte_is_noticed_and_only_that_record_set_aside(spool):
    filled(spool, 20)
    content = bytearray(spool.path.read_bytes())
    content[content.index(b"7....") + 3] ^= 1
    spool.path.write_bytes(content)
    assert numbers(spool) == [number for number in range(20) if number != 7]
    assert spool.state().aside == {DAMAGED: 1}
    assert spool.take_back() == 0


def test_a_file_that_somebody_deletes_or_moves_is_noticed_by_those_who_have_it_open(spool):
    spool.append(event(1))
    spool.path.unlink()
    spool.append(event(2))
    assert numbers(spool) == [2]
    spool.path.rename(spool.path.with_name("elsewhere"))
    spool.append(event(3))
    assert numbers(spool) == [3]


def test_a_retired_file_is_taken_over_whole_and_deleted(spool):
    filled(spool, 600)
    spool.retire()
    assert not spool.path.exists()
    assert not spool.empty()
    assert wholes(spool) == list(range(600))
    assert not list(spool.path.parent.glob("*.aside-*"))


def test_one_process_of_a_host_drains_and_its_death_makes_room(spool, tmp_path):
    marker = tmp_path / "claimed"

    def claims():
        with spool.claim() as mine:
            marker.write_text(str(mine))
            time.sleep(60)

    pid = child(claims)
    while not marker.exists() or not marker.read_text():
        time.sleep(0.01)
    assert marker.read_text() == "True"
    with spool.claim() as mine:
        assert not mine
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with spool.claim() as mine:
        assert mine
        with spool.claim() as again:
            assert not again


def test_a_claim_does_not_live_on_in_a_child_of_whoever_had_it(spool, tmp_path):
    marker = tmp_path / "grandchild"

    def claims_and_forks():
        claim = spool.claim()
        claim.__enter__()
        grandchild = child(lambda: time.sleep(60))
        marker.write_text(str(grandchild))

    pid = child(claims_and_forks)
    assert ended(pid) == 0
    mine, deadline = False, time.monotonic() + PATIENCE_S
    try:
        while not mine:  # until the grandchild has got as far as letting go
            assert time.monotonic() < deadline
            with spool.claim() as mine:
                time.sleep(0.01)
    finally:
        os.kill(int(marker.read_text()), signal.SIGKILL)


def test_a_newer_version_s_file_is_left_alone(spool):
    spool.append(event(1))
    with contextlib.closing(sqlite3.connect(spool.path)) as connection:
        connection.execute("PRAGMA user_version = 7")

    def refused():
        with pytest.raises(SpoolError, match="another version"):
            spool.append(event(2))

    assert ended(child(refused)) == 0
    assert spool.path.exists()


def test_nobody_else_may_read_the_results(spool):
    spool.append(event(1))
    assert {one.name for one in spool.path.parent.iterdir()} == {"s.spool", "s.spool-journal", "s.spool.lock"}
    for one in spool.path.parent.iterdir():
        assert one.stat().st_mode & 0o077 == 0, one


# -- real file systems, made small or read-only in a mount namespace of their own ----------------

IN_A_SMALL_FILE_SYSTEM = """
set -e
mount -t tmpfs -o size=1m tmpfs "$1"
exec "$2" "$3" "$1"
"""
FILLS_IT = """
import os, subprocess, sys
from pathlib import Path
from celery_kafka_backend.errors import SpoolError
from celery_kafka_backend.producer.publisher import Record
from celery_kafka_backend.producer.spool import Spool
folder = Path(sys.argv[1])
spool = Spool(folder / "s.spool", 1 << 30)
spool.check()
taken = 0
try:
    while taken < 10_000:
        spool.append(Record("events", b"task", b"%d" % taken + b"." * 3_000))
        taken += 1
except SpoolError as exc:
    print(exc)
found = [int(one.record.value.rstrip(b".")) for one in spool.oldest(most=10_000)]
assert found == list(range(taken)), (taken, found)
assert taken > 50, taken
try:
    spool.append(Record("events", b"task", b"%d" % taken + b"." * 3_000))
except SpoolError as exc:
    print("again", exc)
spool.remove(found and [one.seq for one in spool.oldest(most=20)])
spool.append(Record("events", b"task", b"0"))
print("took again", len(spool.oldest(most=10_000)) == taken - 19)
if os.fork() == 0:  # leaves no file open here
    os._exit(0)
os.wait()
subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
try:
    spool.append(Record("events", b"task", b"0"))
except SpoolError as exc:
    print("read-only", exc)
try:
    Spool(folder / "other" / "s.spool", 1 << 30).check()
except SpoolError as exc:
    print("at start", exc)
subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
spool.append(Record("events", b"task", b"0"))
print("writable again", len(spool.oldest(most=10_000)) == taken - 18)
"""


def test_a_full_disk_and_a_read_only_one_lose_nothing_and_recover(tmp_path):
    unshare = shutil.which("unshare")
    assert unshare, "needs util-linux"
    options = ["--mount"] if os.geteuid() == 0 else ["--mount", "--map-root-user"]
    folder, script = tmp_path / "small", tmp_path / "fills.py"
    folder.mkdir()
    script.write_text(FILLS_IT)
    done = subprocess.run(
        [unshare, *options, "sh", "-c", IN_A_SMALL_FILE_SYSTEM, "-", str(folder), sys.executable, str(script)],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"the spool {folder}/s.spool cannot be used: database or disk is full"), lines
    assert lines[1].startswith("again the spool"), lines
    assert "took again True" in lines
    assert any(line.startswith("read-only the spool") for line in lines), lines
    assert any(line.startswith("at start the spool") for line in lines), lines
    assert "writable again True" in lines
