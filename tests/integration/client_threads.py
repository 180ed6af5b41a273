"""A client's process under load: threads that ask and journal what they were told."""

from __future__ import annotations

import json
import random
import signal
import sys
import threading
import time
from pathlib import Path


def run(ways, told):
    """``python CLIENT JOURNAL SEED THREADS``: a line of JSON per answer, until SIGTERM; then what is open is ended.

    Args:
        ways: Functions, of which each thread takes one after another by chance.
        told: Called with one of them and the thread's dice; returns what is to be journalled.
    """
    journal, seed, threads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    stopping, lock = threading.Event(), threading.Lock()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    with journal.open("a", buffering=1) as lines:

        def client(dice):
            while not stopping.is_set():
                way = dice.choice(ways)
                began = time.monotonic()
                line = {"way": way.__name__, **told(way, dice), "s": round(time.monotonic() - began, 2)}
                with lock:
                    lines.write(json.dumps(line) + "\n")

        running = [threading.Thread(target=client, args=(random.Random(seed + n),)) for n in range(threads)]
        for one in running:
            one.start()
        print("sending", flush=True)
        for one in running:
            one.join()
