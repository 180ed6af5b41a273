"""The measured figures behind `pipeline size`, and nothing else. No figure here is an estimate.

How they were measured: a virtual machine of 2 cores, Python 3.11, Kafka 4.1 (one broker, 4 partitions) and Redis 7.0
on the same machine. A prefork worker of 2 children ran 8,000 tasks at about 180 tasks/s, sent one by one with `delay()`,
each returning random hexadecimal text of 400 or of 16 bytes; four events per task (sent, received, started, success),
`result_extended` and `task_track_started` on, delivery "acknowledged". Kafka: size of the log's segments divided by
tasks, one run each. Redis: growth of ``used_memory`` divided by tasks, with an empty broker database before and after. Memory and
rate: see below. At this rate batches are small and zstd finds little: a busier fleet needs less disk per event.
The log was compressed with zstd; with lz4, as today (ADR 11), such batches are about a third larger: to be measured again.

When docs/benchmarks.md has later figures from a larger run, put them here, with their source.
"""

from __future__ import annotations

from typing import Final

SOURCE: Final = "measured with 8,000 tasks on 2 cores, everything on one machine; see cli/figures.py and docs/cli.md"

LOG_BYTES_PER_EVENT: Final = 385
"""Of one copy, without result: 388 bytes per event with results of 16 bytes, less their share."""
LOG_BYTES_PER_RESULT_BYTE: Final = 0.67
"""1,809 bytes per task with results of 400 bytes, 1,552 with 16. Random hexadecimal: real results compress better."""

REDIS_BYTES_PER_TASK: Final = 680
"""Document and side record without result: 701 bytes with results of 16 bytes, less their share."""
REDIS_BYTES_PER_RESULT_BYTE: Final = 1.15
"""1,144 bytes per task with results of 400 bytes, 701 with 16."""
REDIS_HISTORY_BYTES_PER_EVENT: Final = 980
"""With ``history: {"redis": True}``: 5,519 bytes per task instead of 1,144, less one result, by four events."""

FOLD_EVENTS_PER_S: Final = 50_000
"""Into Redis, one process, Redis and Kafka on the same 2 cores, no two events of a task in one batch: 56,000 to 58,000
in two runs of `make bench ARGS=fold_redis` (docs/benchmarks.md); rounded down."""
MATERIALIZER_BYTES: Final = 250_000_000
"""Resident memory while catching up: at most 238 MiB seen with results of 100 KB; 46 MB when it keeps up."""
