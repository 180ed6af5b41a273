"""Every metric by name: what it is called, what it says, how it is labelled. docs/metrics.md lists exactly these.

Names follow Prometheus' conventions: base units, ``_total`` for counters. Labels are few and bounded: views,
topics, partitions and processors, never tasks.

A process writes its numbers into its seat of a `board`; `Layout` says where each one is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PREFIX: Final = "celery_kafka_"


class Metric(NamedTuple):
    """One metric.

    Attributes:
        name: In full.
        kind: What its numbers mean.
        help: For people.
        labels: Names of all labels; what a process itself knows is the last one.
        own: Values of that last label, if the process writes one number for each.
        buckets: Upper bounds of a histogram's buckets, without +Inf.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    own: tuple[str, ...] = ("",)
    buckets: tuple[float, ...] = ()

    @property
    def cells(self) -> int:
        """How many numbers one of its series is: a histogram's buckets with +Inf, then the sum; else one."""
        return len(self.buckets) + 2 if self.buckets else 1


_LATENCIES: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES: Final = (1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10000.0)
_WAITS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)


# -- a worker: its main process and its pool -------------------------------------------------------

PUBLISH_SECONDS: Final = Metric(
    f"{PREFIX}publish_seconds", "histogram", "From handing a record to the client library to Kafka's acknowledgement.",
    buckets=_LATENCIES,
)  # fmt: skip
PUBLISH_ERRORS: Final = Metric(
    f"{PREFIX}publish_errors_total", "counter", "Records that Kafka did not acknowledge, by why.",
    ("reason",), ("not_acknowledged", "refused", "too_large"),
)  # fmt: skip
DROPPED: Final = Metric(
    f"{PREFIX}publish_dropped_total", "counter", "Events that nobody waits for, dropped as the queue was full."
)
SENT_AGAIN: Final = Metric(
    f"{PREFIX}publish_sent_again_total", "counter", "Results and chord parts sent again after Kafka did not take them."
)
LOST: Final = Metric(
    f"{PREFIX}publish_lost_total", "counter", "Results and chord parts given up though nobody was there to be told."
)
QUEUED: Final = Metric(f"{PREFIX}publish_queue_records", "gauge", "Records taken and not yet answered by Kafka.")
UNANSWERED: Final = Metric(
    f"{PREFIX}publish_oldest_unanswered_seconds", "gauge",
    "Age of the oldest record that Kafka has not answered, of any process.",
)  # fmt: skip
PROCESSES: Final = Metric(
    f"{PREFIX}worker_processes", "gauge", "Processes of this worker that have a connection to Kafka."
)

SPOOL_RECORDS: Final = Metric(f"{PREFIX}spool_records", "gauge", "Records in this host's spool that wait for Kafka.")
SPOOL_ASIDE: Final = Metric(f"{PREFIX}spool_aside_records", "gauge", "… that are set aside: they are not drained.")
SPOOL_BYTES: Final = Metric(f"{PREFIX}spool_bytes", "gauge", "Bytes of its file that are in use.")
SPOOL_LIMIT: Final = Metric(f"{PREFIX}spool_limit_bytes", "gauge", "Bytes that it may grow to.")
SPOOL_OLDEST: Final = Metric(
    f"{PREFIX}spool_oldest_seconds", "gauge", "Age of the oldest record that waits; 0 if none."
)

WORKER_CELLS: Final = (PUBLISH_SECONDS, PUBLISH_ERRORS, DROPPED, SENT_AGAIN, LOST, QUEUED)
SPOOL: Final = (SPOOL_RECORDS, SPOOL_ASIDE, SPOOL_BYTES, SPOOL_LIMIT, SPOOL_OLDEST)
WORKER: Final = (*WORKER_CELLS, UNANSWERED, PROCESSES, *SPOOL)

# -- a view's materializers --------------------------------------------------------------------------

VIEW_EVENTS: Final = Metric(f"{PREFIX}view_events_total", "counter", "Events folded into the view.", ("view",))
VIEW_FACTS: Final = Metric(f"{PREFIX}view_chord_facts_total", "counter", "Facts about chords shown.", ("view",))
VIEW_CHANGES: Final = Metric(
    f"{PREFIX}view_changes_total", "counter", "Tasks and groups written, once per batch.", ("view",)
)
VIEW_BATCH: Final = Metric(
    f"{PREFIX}view_batch_records", "histogram", "Records per batch.", ("view",), buckets=_SIZES
)  # fmt: skip
VIEW_WRITE: Final = Metric(
    f"{PREFIX}view_write_seconds", "histogram", "One write of a batch into the store; failed ones too.", ("view",),
    buckets=_LATENCIES,
)  # fmt: skip
VIEW_LETTERS: Final = Metric(
    f"{PREFIX}view_dead_letters_total", "counter", "Records that could not be folded or written.", ("view",)
)
VIEW_RETRIES: Final = Metric(
    f"{PREFIX}view_retries_total", "counter", "Failed attempts to write, as the store or Kafka was away.", ("view",)
)
VIEW_MISSED: Final = Metric(
    f"{PREFIX}view_missed_records_total", "counter", "Records that Kafka deleted before they were read.", ("view",)
)
VIEW_REWOUND: Final = Metric(
    f"{PREFIX}view_rewound_partitions_total", "counter", "Partitions read again, as the view had lost some.", ("view",)
)
VIEW_REBALANCES: Final = Metric(
    f"{PREFIX}view_rebalances_total", "counter", "Times that partitions came or went.",
    ("view", "event"), ("assigned", "revoked", "lost"),
)  # fmt: skip
VIEW_PAUSED: Final = Metric(
    f"{PREFIX}view_paused", "gauge", "Processes that wait for the store or the dead letters.", ("view",)
)
VIEW_LAG: Final = Metric(
    f"{PREFIX}view_lag_records", "gauge", "Records of a partition that the view does not have.",
    ("view", "topic", "partition"),
)  # fmt: skip
VIEW_LAG_SECONDS: Final = Metric(
    f"{PREFIX}view_lag_seconds", "gauge", "For how long, at most, the view has lacked the oldest of these; 0 if none.",
    ("view", "topic", "partition"),
)  # fmt: skip

VIEW_CELLS: Final = (
    VIEW_EVENTS, VIEW_FACTS, VIEW_CHANGES, VIEW_BATCH, VIEW_WRITE, VIEW_LETTERS, VIEW_RETRIES, VIEW_MISSED,
    VIEW_REWOUND, VIEW_REBALANCES, VIEW_PAUSED,
)  # fmt: skip

# -- the chord processor -----------------------------------------------------------------------------

CHORDS_OPEN: Final = Metric(f"{PREFIX}chords_open", "gauge", "Chords that are not decided yet.")
CHORDS_DECIDED: Final = Metric(f"{PREFIX}chords_decided_total", "counter", "Decisions appended.")
CHORDS_LOST: Final = Metric(
    f"{PREFIX}chords_decisions_lost_total", "counter", "Decisions of which another owner's came first."
)
CHORDS_FIRED: Final = Metric(
    f"{PREFIX}chords_fired_total", "counter",
    "Chords carried out: body sent, body failed, or found to have been sent by another owner.",
    ("outcome",), ("sent", "failed", "found"),
)  # fmt: skip
CHORDS_DELAY: Final = Metric(
    f"{PREFIX}chords_body_delay_seconds", "histogram",
    "From a chord's last part, by its worker's clock, to its body sent, by ours.", buckets=_WAITS,
)  # fmt: skip
CHORDS_RETRIES: Final = Metric(
    f"{PREFIX}chords_retries_total", "counter", "Attempts to send a body that failed, as the broker or Kafka was away."
)
CHORDS_LETTERS: Final = Metric(f"{PREFIX}chords_dead_letters_total", "counter", "Records given up.")
CHORDS_REBUILT: Final = Metric(
    f"{PREFIX}chords_rebuilds_total", "counter", "Times that a partition was read from its start."
)

CHORDS_CELLS: Final = (
    CHORDS_OPEN, CHORDS_DECIDED, CHORDS_LOST, CHORDS_FIRED, CHORDS_DELAY, CHORDS_RETRIES, CHORDS_LETTERS,
    CHORDS_REBUILT,
)  # fmt: skip

# -- every processor ---------------------------------------------------------------------------------

UP: Final = Metric(f"{PREFIX}processor_up", "gauge", "1 while the processor's process runs.", ("processor",))
STARTS: Final = Metric(
    f"{PREFIX}processor_starts_total", "counter", "Times that the processor's process was started.", ("processor",)
)
TURN: Final = Metric(
    f"{PREFIX}processor_last_turn_seconds", "gauge", "Since the processor's loop last turned.", ("processor",)
)
PARTITIONS: Final = Metric(
    f"{PREFIX}processor_partitions", "gauge", "Partitions that the processor has.", ("processor",)
)

PROCESSORS: Final = (*VIEW_CELLS, VIEW_LAG, VIEW_LAG_SECONDS, *CHORDS_CELLS, UP, STARTS, TURN, PARTITIONS)

# -- insight: what `top` shows -----------------------------------------------------------------------

_FIGURE: Final = ("by", "name", "window")
"""Of what (task, queue, worker), which one, and over how long."""

INSIGHT_RATE: Final = Metric(
    f"{PREFIX}insight_events_per_second", "gauge", "Events in a window, by kind.", (*_FIGURE, "kind")
)
INSIGHT_FAILURES: Final = Metric(
    f"{PREFIX}insight_failure_ratio",
    "gauge",
    "Failures and lost workers among the attempts that ended for good.",
    _FIGURE,
)
INSIGHT_RETRIES: Final = Metric(
    f"{PREFIX}insight_retry_ratio", "gauge", "Retries among all attempts that ended.", _FIGURE
)
INSIGHT_WAIT: Final = Metric(
    f"{PREFIX}insight_wait_seconds", "gauge", "From when a task could have started to when it did, quantiles.",
    (*_FIGURE, "quantile"),
)  # fmt: skip
INSIGHT_RUN: Final = Metric(
    f"{PREFIX}insight_run_seconds", "gauge", "Run times of attempts that ended, quantiles.", (*_FIGURE, "quantile")
)
INSIGHT_IN_FLIGHT: Final = Metric(
    f"{PREFIX}insight_in_flight", "gauge", "Attempts that began within the last hour and are not over.", ("by", "name")
)
INSIGHT_OLDEST: Final = Metric(
    f"{PREFIX}insight_oldest_seconds", "gauge", "Since the minute in which the oldest of these began; 0 if none.",
    ("by", "name"),
)  # fmt: skip
INSIGHT_AGE: Final = Metric(
    f"{PREFIX}insight_age_seconds", "gauge", "Since an insight processor last wrote, when these figures were read."
)
INSIGHT: Final = (
    INSIGHT_RATE, INSIGHT_FAILURES, INSIGHT_RETRIES, INSIGHT_WAIT, INSIGHT_RUN, INSIGHT_IN_FLIGHT, INSIGHT_OLDEST,
    INSIGHT_AGE,
)  # fmt: skip

ALL: Final = (*WORKER, *PROCESSORS, *INSIGHT)


class Layout:
    """Where each number of some metrics is in a seat.

    Args:
        metrics: In order.
        more: Names of numbers that are no metrics: moments, for one.
    """

    def __init__(self, metrics: Iterable[Metric], more: Iterable[str] = ()) -> None:
        self.metrics = tuple(metrics)
        self._at: dict[tuple[str, str], int] = {}
        size = 0
        for metric in self.metrics:
            for own in metric.own:
                self._at[metric.name, own] = size
                size += metric.cells
        for name in more:
            self._at[name, ""] = size
            size += 1
        self.size = size
        self.gauges = tuple(self.at(one) for one in self.metrics if one.kind == "gauge")
        """What a process that takes a seat over must set to 0; counters go on."""

    def at(self, metric: Metric | str, own: str = "") -> int:
        """Return where a series begins."""
        return self._at[metric if isinstance(metric, str) else metric.name, own]

    def series(self) -> Iterator[tuple[Metric, str, slice]]:
        """Yield every series: its metric, the value of its own label, where its numbers are."""
        for metric in self.metrics:
            for own in metric.own:
                at = self.at(metric, own)
                yield metric, own, slice(at, at + metric.cells)
