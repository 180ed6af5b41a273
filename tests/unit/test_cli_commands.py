"""The command line without any server: help, mistakes, exit codes, secrets."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner

from celery_kafka_backend import timeline
from celery_kafka_backend.cli import checks, output, pipeline
from celery_kafka_backend.cli.command import complain
from celery_kafka_backend.cli.context import Pipeline
from celery_kafka_backend.cli.exits import MEANINGS, Exit, Stop, code_of
from celery_kafka_backend.cli.filters import meant
from celery_kafka_backend.cli.history_shown import outcome
from celery_kafka_backend.configure import settings_of
from celery_kafka_backend.errors import ForeignLog, NotAcknowledged, SettingsError, Unavailable
from celery_kafka_backend.events import Event
from celery_kafka_backend.producer.publisher import Record
from celery_kafka_backend.producer.spool import Spool, spool_for
from celery_kafka_backend.settings import parse
from celery_kafka_backend.topics import view_name

SECRET = "hunter2"
COMMANDS = (
    "run",
    "init",
    "status",
    "doctor",
    "history",
    "search",
    "export",
    "findings",
    "forget",
    "replay",
    "verify",
    "size",
    "spool",
)


def invoke(*arguments, backend=f"kafka://127.0.0.1:1/?view=redis://:{SECRET}@127.0.0.1:1/0", settings=None):
    app = Celery("proj", broker="memory://", backend=backend, set_as_current=False)
    if settings is not None:
        app.conf.kafka_backend_settings = settings
    done = CliRunner().invoke(pipeline, arguments, obj=CLIContext(app, no_color=True, workdir=None))
    assert SECRET not in done.output
    assert "Traceback" not in done.output
    return done


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_examples_and_names_environment_variables(command):
    done = invoke(command, "--help")
    assert done.exit_code == 0
    assert "Examples:\n    celery -A proj pipeline" in done.output
    if command != "history":
        assert f"CELERY_PIPELINE_{command.upper()}_" in " ".join(done.output.split())


@pytest.mark.parametrize("action", ["list", "show", "requeue", "drop"])
def test_a_command_of_a_command_has_its_own_help_and_variables(action):
    done = invoke("dead-letters", action, "--help")
    assert done.exit_code == 0
    assert f"Examples:\n    celery -A proj pipeline dead-letters {action}" in done.output
    assert f"CELERY_PIPELINE_DEAD_LETTERS_{action.upper()}_TIMEOUT" in " ".join(done.output.split())
    assert f"\n  {action} " in invoke("dead-letters", "--help").output


def test_the_help_of_the_group_lists_commands_and_exit_codes():
    text = invoke("--help").output
    assert all(f"\n  {command} " in text for command in COMMANDS)
    assert all(f"\n  {int(code):<3} " in text for code in MEANINGS)


def test_every_exit_code_has_a_meaning_and_the_promised_ones_their_numbers():
    assert set(MEANINGS) == set(Exit)
    assert (Exit.OK, Exit.NOBODY_FOLDS) == (0, 2)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SettingsError("a", "b"), Exit.CONFIGURATION),
        (ForeignLog("x"), Exit.FOREIGN_LOG),
        (NotAcknowledged("x"), Exit.KAFKA_UNREACHABLE),
        (Unavailable("x"), Exit.VIEW_UNUSABLE),
        (Stop(Exit.DIFFERENT, "x"), Exit.DIFFERENT),
        (ValueError("x"), Exit.UNEXPECTED),
    ],
)
def test_each_error_has_its_exit_code(error, code):
    assert code_of(error) is code


def test_a_mistake_on_the_command_line_is_configuration_and_not_nobody_folds():
    for arguments in (("run", "--wat"), ("nosuch",), ("size",), ("run", "--processes", "0")):
        assert invoke(*arguments).exit_code == Exit.CONFIGURATION


def test_a_command_that_does_not_exist_is_told_with_the_one_that_was_meant():
    assert "Did you mean 'status'?" in invoke("statsu").output
    assert "Did you mean 'requeue'?" in invoke("dead-letters", "reqeue").output
    assert "Did you mean" not in invoke("wat").output


def test_a_state_that_may_be_misspelt_is_asked_about_and_one_s_own_is_not():
    assert meant(["FAILED"]) == "--state FAILED: did you mean FAILURE? Or "
    assert meant(["success", "worker_lost"]) == "--state worker_lost: did you mean worker-lost? Or "
    assert meant(["FAILURE", "worker-lost", "SHIPPED"]) == ""


def test_where_a_replay_may_begin_is_told_in_full():
    assert "earliest; TOPIC:PARTITION:OFFSET" in invoke("replay", "--to", "redis", "--from", "whenever").output


def test_an_unknown_setting_is_named_with_the_one_that_was_meant():
    done = invoke("run", settings={"partitons": 3})
    assert done.exit_code == Exit.CONFIGURATION
    assert "kafka_backend_settings['partitons']" in done.output
    assert "'partitions'" in done.output


@pytest.mark.parametrize(
    ("name", "given"), [("history", {"redsi": True}), ("view_options", {"redsi": {"socket_timeout": 3}})]
)
def test_a_setting_for_a_scheme_that_no_view_can_have_is_refused(name, given):
    done = invoke("run", settings={name: given})
    assert done.exit_code == Exit.CONFIGURATION
    assert f"kafka_backend_settings['{name}']: 'redsi' is no view's URL scheme. did you mean 'redis'?" in done.output


def test_a_contradictory_setting_is_named():
    done = invoke("init", settings={"replication_factor": 1, "min_insync_replicas": 2})
    assert done.exit_code == Exit.CONFIGURATION
    assert "min_insync_replicas" in done.output


def test_another_result_backend_is_said_to_be_one():
    done = invoke("status", backend=f"redis://:{SECRET}@localhost/0")
    assert done.exit_code == Exit.CONFIGURATION
    assert "result_backend" in done.output
    assert "kafka://" in done.output


def test_a_view_of_an_unknown_scheme_is_refused_before_anything_starts():
    done = invoke("run", backend=f"kafka://127.0.0.1:1/?view=bogus://:{SECRET}@h/0")
    assert done.exit_code == Exit.CONFIGURATION
    assert "bogus" in done.output
    assert "known:" in done.output


def test_a_view_is_chosen_by_url_scheme_or_name_and_others_are_refused():
    done = invoke("run", "--view", "sqlite")
    assert done.exit_code == Exit.CONFIGURATION
    assert "--view sqlite: no such view" in done.output
    assert "redis-" in done.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--no-chords", "--chords-only"),
        ("run", "--view", "redis", "--chords-only"),
        ("history", "x", "--log", "--no-log"),
        ("history", "x", "--around", "1h", "--no-log"),
        ("history", "x", "--follow", "--as-of", "1h"),
        ("history", "x", "--window", "1h"),
        ("history",),
        ("history", "--as-of", "1h", "--tree"),
        ("history", "x", "--as-of", "whenever"),
        ("search", "--since", "1h", "--until", "2h"),
        ("search", "--min-duration", "2s", "--max-duration", "1s"),
        ("search", "--view", "redis", "--log"),
        ("search", "--view", "redis"),  # it keeps no history unless told to
        ("search", "--limit", "0"),
        ("export", "--format", "parquet"),
        ("export", "--format", "csv"),
        ("findings", "--since", "1h", "--until", "2h"),
        ("findings", "--kind", "wat"),
        ("forget",),
        ("chord", "x", "--fire", "--fail", "--reason", "r"),
        ("replay", "--to", "redis", "--continue", "--from", "1h"),
        ("replay", "--to", "redis", "--from", "whenever"),
        ("verify", "--view", "redis", "--against", "redis"),
    ],
)
def test_options_that_contradict_each_other_are_refused(arguments):
    assert invoke(*arguments).exit_code == Exit.CONFIGURATION


def test_a_wrong_address_is_named_with_its_setting_within_the_timeout():
    done = invoke("run", "--timeout", "0.2")
    assert done.exit_code == Exit.KAFKA_UNREACHABLE
    assert "127.0.0.1:1 within 0.2 s" in done.output
    assert "result_backend" in done.output


def test_print_asks_nobody():
    done = invoke("init", "--print")
    assert done.exit_code == 0
    assert done.output.count("kafka-topics.sh") == 5
    assert "kafka-acls.sh" in done.output


def test_size_as_json_is_json():
    found = json.loads(invoke("size", "--tasks-per-day", "2e6", "--json").output)
    assert found["needs"]["processes"] == 1
    assert found["source"]


def test_doctor_goes_on_without_kafka_and_gives_one_verdict():
    done = invoke("doctor", "--timeout", "0.2")
    assert done.exit_code == Exit.KAFKA_UNREACHABLE
    assert "fail  kafka" in done.output
    assert done.output.count("Not well:") == 1


def test_doctor_asks_of_a_shadow_for_no_processor_of_chords():
    def looked_for(**conf):
        app = Celery("proj", broker="memory://", set_as_current=False)
        app.conf.update(conf)
        pipeline = Pipeline(app, "proj", settings_of(app))
        broker = SimpleNamespace(settings=pipeline.settings, members=lambda _group: [])
        return [found.text.partition(":")[0] for found in checks.processors(pipeline, broker)]

    url = "kafka://127.0.0.1:1/?view=memory://"
    assert looked_for(result_backend="redis://h/1", kafka_shadow=url) == [view_name("memory://")]
    assert looked_for(result_backend=url, kafka_shadow=url) == [view_name("memory://"), "chords"]


@pytest.fixture
def without_rich(monkeypatch):
    real = builtins.__import__

    def importing(name, *args, **kwargs):
        if name.startswith("rich"):
            raise ModuleNotFoundError("No module named 'rich'", name="rich")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)


@pytest.mark.usefixtures("without_rich")
def test_a_search_as_json_needs_no_rich():
    done = invoke("search", "--view", "memory", "--json", backend="kafka://127.0.0.1:1/?view=memory://rich")
    assert done.exit_code == Exit.NOT_FOUND
    assert done.stdout == "[]\n"


@pytest.mark.usefixtures("without_rich")
@pytest.mark.parametrize("drawing", [output.console, lambda: output.table(""), output.progress])
def test_a_missing_rich_is_said_with_its_remedy(drawing):
    with pytest.raises(Stop, match=r"pip install 'celery-kafka-backend\[processor\]'") as caught:
        drawing()
    assert caught.value.code is Exit.CONFIGURATION


def test_a_remedy_is_what_the_user_would_type(capsys):
    complain(
        NotAcknowledged("no", "grant what `celery -A proj pipeline init --print` lists"), "celery -A shop pipeline"
    )
    assert "`celery -A shop pipeline init --print`" in capsys.readouterr().err


def test_an_unexpected_error_is_one_line_without_secrets(capsys):
    assert complain(RuntimeError(f"redis://:{SECRET}@h/0")) is Exit.UNEXPECTED
    said = capsys.readouterr().err
    assert "RuntimeError" in said
    assert SECRET not in said
    assert "Traceback" not in said


def test_celerys_other_commands_do_not_pay_for_this_one():
    code = "import sys, celery_kafka_backend.cli; print(sorted(m for m in sys.modules if m.split('.')[0] in ('rich', 'confluent_kafka')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_time_in_the_queue_does_not_count_a_countdown():
    event = Event(id="e", kind="started", task="t", at=9_000, hlc=9_000, sent_at=1_000, eta=6_000, started_at=9_000)
    assert timeline.wait_s(event) == 3.0


def test_a_retry_says_why_and_when_it_is_due():
    event = Event(
        id="e", kind="retry", task="t", at=1, hlc=1, exception="builtins.ValueError", message="no\nluck", due=1_000
    )
    assert outcome(event).startswith("ValueError: no luck; again at ")


def test_a_spool_that_is_not_configured_says_how():
    done = invoke("spool", "status")
    assert done.exit_code == Exit.CONFIGURATION
    assert "kafka_backend_settings['spool']" in done.output


def test_the_spool_s_status_tells_what_is_there_and_what_is_not_drained(tmp_path):
    settings = {"spool": str(tmp_path)}
    spool = spool_for(parse("kafka://127.0.0.1:1/?view=memory://", settings))
    assert "empty" in invoke("spool", "status", settings=settings).output
    for number in range(3):
        spool.append(Record("events", b"task-%d" % number, b"v"))
    done = invoke("spool", "status", settings=settings)
    assert done.exit_code == Exit.OK
    assert "3 records, the oldest from" in done.output
    assert f"3 spooled by pid {os.getpid()}" in done.output
    spool.set_aside(spool.oldest()[0].seq, "too large")
    (tmp_path / "celery-00000000.spool").write_bytes(b"")
    done = invoke("spool", "status", settings=settings)
    assert done.exit_code == Exit.DIFFERENT
    assert "1 set aside: too large" in done.output
    assert "of other servers or another prefix: " in done.output


def test_doctor_looks_at_the_spool_of_this_host(tmp_path, monkeypatch):
    settings = {"spool": str(tmp_path / "spool")}
    place = spool_for(parse("kafka://127.0.0.1:1/?view=memory://", settings))

    def findings():
        return [
            (one["level"], one["text"])
            for one in json.loads(invoke("doctor", "--timeout", "0.2", "--json", settings=settings).stdout)["findings"]
            if one["subject"] == "spool"
        ]

    ((level, text),) = findings()
    assert level == "ok"
    assert "can be written: 0 records" in text
    assert not place.path.exists()
    place.append(Record("events", b"task", b"v"))
    place.append(Record("events", b"other", b"v"))
    place.set_aside(place.oldest()[0].seq, "too large")
    monkeypatch.setattr(checks, "UNDRAINED_S", -1.0)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _path: SimpleNamespace(free=1_000_000))
    waiting, aside, room, fine = findings()
    assert waiting[0] == aside[0] == room[0] == "warn"
    assert "1 results and parts wait in" in waiting[1]
    assert aside[1].startswith("1 records set aside and 0 damaged files")
    assert "1.0 MB free on the disk" in room[1]
    assert fine[0] == "ok"


def test_doctor_says_that_the_spool_s_folder_cannot_be_used(tmp_path):
    (tmp_path / "spool").write_text("a file where the folder should be")
    done = invoke("doctor", "--timeout", "0.2", settings={"spool": str(tmp_path / "spool")})
    assert "fail  spool" in done.output
    assert "kafka_backend_settings['spool']" in done.output


def test_a_drain_keeps_what_kafka_does_not_take_and_takes_other_files_over(tmp_path):
    settings = {"spool": str(tmp_path / "here"), "publish_timeout_s": 0.2}
    spool = spool_for(parse("kafka://127.0.0.1:1/?view=memory://", settings))
    other = Spool(tmp_path / "elsewhere" / "other.spool", 1 << 20)
    other.append(Record("events", b"task", b"v"))
    done = invoke("spool", "drain", "--timeout", "0.2", "--from", str(other.path), settings=settings)
    assert done.exit_code == Exit.KAFKA_UNREACHABLE
    assert "1 records taken over" in done.output
    assert "1 records left" in done.output
    assert len(spool.holding("task")) == 1
    assert not other.path.exists()
