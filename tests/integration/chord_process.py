"""A chord processor in a process of its own, which tells what it does and can be held at one point.

Run by test_chord_processor.py: ``python -m tests.integration.chord_process '{"servers": …}'``. Where it is
held is this file's doing: the product has no such points.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from threading import Thread

from celery_kafka_backend import settings as settings_module
from celery_kafka_backend.processors.chords import ChordProcessor
from celery_kafka_backend.processors.sending import Sender
from tests.integration.chord_world import make_app, make_settings


def say(what, **more):
    print(json.dumps({"what": what, **more}), flush=True)


class Point:
    """Waits at ``hold`` until the file ``release`` exists."""

    hold = ""
    release = Path()

    def wait_at(self, point):
        say(point)
        if point == self.hold:
            while not self.release.exists():
                time.sleep(0.02)
            say(f"released at {point}")


class WatchedSender(Sender):
    """Says what it does."""

    point: Point

    def once(self, held, fire, wanted, lost):
        say("decision seen", owner=fire.decided.owner, look_first=fire.look_first)
        self.point.wait_at("before reading")
        fired = super().once(held, fire, wanted, lost)
        if fired is None:
            say("not sent: it was no longer ours to do")
        elif fired.found:
            say("not sent: its events are in the log")
        return fired

    def again(self, held, resend, wanted, lost):
        self.point.wait_at("before sending again")
        done = super().again(held, resend, wanted, lost)
        say("sent again", found=done.found, outcome=done.outcome)
        self.point.wait_at("after sending again")
        return done

    def send(self, declared, decided, parts):
        self.point.wait_at("before sending")
        outcome = super().send(declared, decided, parts)
        self.point.wait_at("after sending")
        return outcome


class Watched(ChordProcessor):
    """Likewise."""

    make_sender = WatchedSender

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.point = self.sender.point = Point()

    def _append(self, held, records):
        self.point.wait_at("before deciding")
        super()._append(held, records)


def main():
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    faulthandler.register(signal.SIGUSR1)  # for whoever waits for us in vain
    given = json.loads(sys.argv[1])
    settings = make_settings(given["servers"], given["prefix"])
    assert isinstance(settings, settings_module.Settings)
    processor = Watched(make_app(given["folder"]), settings, owner=given["owner"])
    processor.point.hold, processor.point.release = given.get("hold", ""), Path(given["folder"], "release")
    signal.signal(signal.SIGTERM, lambda *_: processor.stop())
    parent = os.getppid()

    def watch_parent():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    Thread(target=watch_parent, daemon=True).start()
    say("running", pid=os.getpid())
    processor.run()
    say("stopped")


if __name__ == "__main__":
    main()
