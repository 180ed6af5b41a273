"""What runs in a processor's own process: a materializer, or the chord processor. For `supervisor`.

Both are functions at the top of a module with arguments that can be pickled, for each child is a
fresh interpreter. A materializer gets its settings ready-made and imports neither Celery's app nor
the user's code; the chord processor needs both, because sending a body runs user code.
"""

from __future__ import annotations

import gc
import logging
import signal
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from celery import Celery

    from celery_kafka_backend.processors.metering import Place
    from celery_kafka_backend.settings import Settings
    from celery_kafka_backend.sinks.contract import StoreOptions

LOG_FORMAT: Final = "%(asctime)s %(levelname)-7s %(process)d %(message)s"


def log_to_stderr(level: str) -> None:
    """Set up logging for one process of the pipeline."""
    logging.basicConfig(level=level.upper(), format=LOG_FORMAT)


def calm() -> None:
    """Have Python look for cycles less often: a batch is thousands of tuples and messages without a cycle among them.

    Python's default, a collection every 700, took a fifth of the time (measured: fold 103 k/s, with this 180 k/s).
    """
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def fold_view(level: str, settings: Settings, url: str, options: StoreOptions, place: Place | None = None) -> None:
    """Feed one view until SIGTERM."""
    from celery_kafka_backend.processors.materializer import materialize  # noqa: PLC0415 - in the child, not before

    log_to_stderr(level)
    materialize(settings, url, options, place)


def keep_insight(level: str, settings: Settings, url: str, options: StoreOptions) -> None:
    """Keep the insight view until SIGTERM."""
    from celery_kafka_backend.processors.insight import run  # noqa: PLC0415 - as above, and an extra

    log_to_stderr(level)
    run(settings, url, options)


def decide_chords(level: str, reference: str, place: Place | None = None) -> None:
    """Decide chords and send their bodies until SIGTERM.

    Args:
        level: Log level.
        reference: The app, as ``celery -A`` takes it; "" for Celery's default app.
        place: Where to write metrics, if anywhere.
    """
    from celery_kafka_backend.configure import settings_of  # noqa: PLC0415 - as above
    from celery_kafka_backend.processors.chords import ChordProcessor  # noqa: PLC0415

    log_to_stderr(level)
    app = load_app(reference)
    processor = ChordProcessor(app, settings_of(app))
    if place is not None:
        from celery_kafka_backend.processors.metering import ChordMeter  # noqa: PLC0415 - only where metrics are wanted

        processor.meter = ChordMeter(place)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: processor.stop())
    processor.run()


def load_app(reference: str) -> Celery:
    """Return the user's app, with the modules of its tasks imported."""
    from celery import current_app  # noqa: PLC0415 - as above
    from celery.app.utils import find_app  # noqa: PLC0415

    app: Celery = find_app(reference) if reference else current_app._get_current_object()  # noqa: SLF001 - a proxy
    app.set_current()
    app.finalize()
    app.loader.import_default_modules()
    return app
