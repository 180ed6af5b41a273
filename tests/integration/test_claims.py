"""Large results end to end: refused finally without a claim check, whole with one, and clear errors where the object is not."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path

import pytest
from celery import Celery
from kombu.exceptions import DecodeError, EncodeError

from celery_kafka_backend.errors import ClaimLost
from tests.integration.conftest import Fleet
from tests.patience import PATIENCE_S

pytestmark = [pytest.mark.kafka, pytest.mark.redis]

LARGE = 20_000_000


@pytest.fixture(scope="module")
def claimed(kafka, redis_server, tmp_path_factory):
    """A fleet with a claim check in a folder that its processes share."""
    folder = tmp_path_factory.mktemp("claimed")
    settings = {"claim_check": f"file://{folder}/objects", "claim_check_bytes": 100_000}
    databases = redis_server.clean_database(), redis_server.clean_database()
    with Fleet(kafka.bootstrap, *databases, folder, settings, {}) as made:
        made.serve()
        yield made


def objects(fleet):
    return [path for path in (fleet.folder / "objects").rglob("*") if path.is_file()]


def test_a_result_over_the_limit_fails_the_task_and_says_so(fleet):
    result = fleet.app.big.delay(2_000_000)
    with pytest.raises(EncodeError, match="over max_message_bytes = 1048576"):
        result.get(timeout=PATIENCE_S)
    assert result.state == "FAILURE"


def test_twenty_megabytes_arrive_whole(claimed):
    result = claimed.app.big.delay(LARGE)
    assert result.get(timeout=PATIENCE_S) == "x" * LARGE
    assert result.state == "SUCCESS"
    document = claimed.app.app.backend.reader.documents([result.id])[result.id]
    assert len(document) < 2_000
    stub = json.loads(document)
    (path,) = [one for one in objects(claimed) if one.parent.name + "/" + one.name == stub["claim"]["path"]]
    held = path.read_bytes()
    assert (len(held), hashlib.sha256(held).hexdigest()) == (stub["claim"]["bytes"], stub["claim"]["sha256"])
    assert json.loads(held)["result"] == "x" * LARGE  # what Celery's own backend would have stored


def test_small_results_stay_where_they_were(claimed):
    before = objects(claimed)
    assert claimed.app.add.delay(1, 2).get(timeout=PATIENCE_S) == 3
    assert objects(claimed) == before


def test_a_large_failure_keeps_its_exception(claimed):
    result = claimed.app.fail.delay("n" * 200_000)
    with pytest.raises(ValueError, match=r"^n{200000}$"):
        result.get(timeout=PATIENCE_S)
    assert "ValueError" in result.traceback


def test_a_state_is_known_without_the_object_and_a_lost_one_is_a_clear_error(claimed):
    result = claimed.app.big.delay(300_000)
    ended(claimed, result.id)
    for one in objects(claimed):
        one.unlink()
    fresh = claimed.app.app.AsyncResult(result.id)
    assert fresh.state == "SUCCESS"
    assert fresh.ready()
    with pytest.raises(ClaimLost, match="is not there: removed or expired"):
        fresh.get(timeout=PATIENCE_S)


def test_a_damaged_object_is_a_clear_error(claimed):
    result = claimed.app.big.delay(300_000)
    ended(claimed, result.id)
    for one in objects(claimed):
        one.write_bytes(one.read_bytes()[:-1] + b"!")
    with pytest.raises(ClaimLost, match="damaged"):
        claimed.app.app.AsyncResult(result.id).get(timeout=PATIENCE_S)


def test_a_stock_client_raises_instead_of_returning_the_reference(claimed):
    result = claimed.app.big.delay(300_000)
    assert result.get(timeout=PATIENCE_S) == "x" * 300_000
    stock = Celery("stock", broker="memory://", backend=claimed.view)
    with pytest.raises(DecodeError, match=r"Unsupported type.*celery-kafka-backend\.claim"):
        stock.AsyncResult(result.id).get(timeout=10)


def test_history_shows_the_reference(claimed):
    result = claimed.app.big.delay(300_000)
    result.get(timeout=PATIENCE_S)
    done = claimed.run("pipeline", "history", result.id, "--json")
    assert done.returncode == 0, done.stderr
    (ending,) = [one for one in json.loads(done.stdout) if one["kind"] == "success"]
    assert ending["claim"]["bytes"] > 300_000
    assert ending["claim"] == ending["doc"]["claim"]


def test_what_has_passed_its_day_is_removed_and_nothing_else(claimed):
    base = claimed.folder / "objects"
    result = claimed.app.big.delay(300_000)
    result.get(timeout=PATIENCE_S)
    for day in ("2026-01-01", "2026-01-02", "never", "not-ours"):
        (base / day).mkdir(parents=True)
        (base / day / ("0" * 32)).write_bytes(b"old")
    dry = claimed.run("pipeline", "claims", "expire", "--dry-run")
    assert (dry.returncode, (base / "2026-01-01").exists()) == (0, True), dry.stderr
    done = claimed.run("pipeline", "claims", "expire")
    assert done.returncode == 0, done.stderr
    assert "2026-01-01: 1 object removed" in done.stdout
    assert {one.name for one in base.iterdir()} >= {"never", "not-ours"}
    assert not (base / "2026-01-01").exists()
    assert claimed.app.app.AsyncResult(result.id).get(timeout=PATIENCE_S) == "x" * 300_000


def test_doctor_looks_whether_the_store_can_be_written(claimed):
    assert "ok    claim check" in claimed.run("pipeline", "doctor").stdout


def test_a_store_that_is_away_is_as_kafka_away(claimed):
    """Last: it takes the folder away. A file stands where the day's folder must be made."""
    base = claimed.folder / "objects"
    shutil.rmtree(base)
    base.write_text("in the way")
    result = claimed.app.big.delay(300_000)
    claimed.until("worker", "the claim check store")
    assert "did not take" in claimed.log("worker")
    assert claimed.app.add.delay(1, 2).get(timeout=PATIENCE_S) == 3
    assert not Path(base).is_dir()
    assert result.id


def ended(fleet, task_id):
    """Wait without asking for the result."""
    deadline = time.monotonic() + PATIENCE_S
    while fleet.app.app.AsyncResult(task_id).state != "SUCCESS":
        assert time.monotonic() < deadline
        time.sleep(0.05)
