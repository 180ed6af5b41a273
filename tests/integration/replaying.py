"""A replay as a process of its own, to be killed: ``python -m tests.integration.replaying BOOTSTRAP PREFIX URL RATE``.

What ``pipeline replay --to URL --continue --rate RATE`` does, without the time that Celery's command line takes to start.
"""

from __future__ import annotations

import sys

import msgspec

from celery_kafka_backend.processors.plan import Target, begin, prepare
from celery_kafka_backend.processors.replay import feed
from tests.integration.materializing import options, settings


def main(bootstrap: str, prefix: str, url: str, rate: str) -> None:
    config, target = settings(bootstrap, prefix), Target(url, options(prefix))
    prepared = prepare(config, target, go_on=True)
    begin(target, prepared)
    feed(config, target, msgspec.structs.replace(prepared.job, per_s=float(rate)))


if __name__ == "__main__":
    main(*sys.argv[1:])
