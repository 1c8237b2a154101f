# `make demo` and `make test` do all their own set-up; see README.md.
CARGO ?= cargo

.PHONY: bench bench-all bench-check bench-engine demo test lint fmt fuzz setup-build setup-test

# A private Postgres with sample data, the server, and a page of live queries.
demo: setup-build
	$(CARGO) build --release --locked
	exec target/release/zeroring demo

# Lints, doc tests, then every test; ends with the runner's summary.
test: setup-test lint
	$(CARGO) test --workspace --doc --locked
	$(CARGO) nextest run --workspace --locked --no-tests=fail

# The original and ours side by side (A-B-B-A), then ours with client views in a local file; writes
# docs/benchmarks/. It ends within BENCH_MINUTES of measuring, whatever happens.
# BENCH_SERVERS, BENCH_SCENARIOS and BENCH_FLAGS narrow or change it.
BENCH_SCENARIOS ?= $(wildcard loadtest/scenarios/*.toml)
BENCH_SERVERS ?= --server original --server zeroring --server zeroring-file
BENCH_FLAGS ?= --abba
BENCH_MINUTES ?= 28
BENCH_OUTPUT ?= docs/benchmarks/results.json docs/benchmarks/report.html
bench: setup-test
	$(CARGO) build --release --locked -p zeroring -p zeroring-loadtest
	target/release/zeroring-loadtest run $(BENCH_SCENARIOS) $(BENCH_SERVERS) $(BENCH_FLAGS) \
	  --minutes $(BENCH_MINUTES) \
	  --json $(word 1,$(BENCH_OUTPUT)) --html $(word 2,$(BENCH_OUTPUT))

# What single parts of the engine and the server count, against committed figures. `make test`
# compares allocations; this compares instructions too (valgrind; minutes).
bench-check:
	$(CARGO) run --locked -q -p zeroring-bench -- --check-instructions

# Our engine and the original's alone, on the same data and queries; writes
# docs/benchmarks/engine.md and engine.json.
bench-engine: setup-test
	$(CARGO) build --release --locked -p zeroring-bench
	target/release/zeroring-bench --compare tests/client/node_modules docs/benchmarks

# The scenarios that `make bench` leaves out: mixed queries, churn, stalled clients, models of
# feeds, mail, forums and customer lists. Each server once.
bench-all:
	$(MAKE) bench BENCH_SCENARIOS="$(wildcard loadtest/scenarios/more/*.toml)" BENCH_FLAGS= \
	  BENCH_SERVERS="--server original --server zeroring" BENCH_MINUTES=60 \
	  BENCH_OUTPUT="docs/benchmarks/more-results.json docs/benchmarks/more-report.html"

# Every fuzzer against its oracle, with new seeds, then a summary of what was compared: about
# a quarter of an hour on two cores (an estimate). FUZZ_SCALE=10 takes ten times as long (and all query shapes),
# FUZZ_SEED repeats a run, FUZZ_ONLY=engine leaves out what needs Postgres or sockets.
fuzz: setup-test
	scripts/fuzz.sh

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

fmt:
	$(CARGO) fmt --all

setup-build:
	scripts/setup.sh build

setup-test:
	scripts/setup.sh test
