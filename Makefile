# `make demo` and `make test` do all their own set-up; see README.md.
CARGO ?= cargo

.PHONY: bench demo test lint fmt fuzz setup-build setup-test

# A private Postgres with sample data, the server, and a page of live queries.
demo: setup-build
	$(CARGO) build --release --locked
	exec target/release/zeroring demo

# Lints, doc tests, then every test; ends with the runner's summary.
test: setup-test lint
	$(CARGO) test --workspace --doc --locked
	$(CARGO) nextest run --workspace --locked --no-tests=fail

# The original and ours side by side (A-B-B-A), about half an hour; writes docs/benchmarks/.
# BENCH_SERVERS, BENCH_SCENARIOS and BENCH_FLAGS narrow or change it.
BENCH_SCENARIOS ?= $(wildcard loadtest/scenarios/*.toml)
BENCH_SERVERS ?= --server original --server zeroring
BENCH_FLAGS ?= --abba
bench: setup-test
	$(CARGO) build --release --locked -p zeroring -p zeroring-loadtest
	target/release/zeroring-loadtest run $(BENCH_SCENARIOS) $(BENCH_SERVERS) $(BENCH_FLAGS) \
	  --json docs/benchmarks/results.json --html docs/benchmarks/report.html

# Every fuzzer against its oracle, with new seeds, then a summary of what was compared: about
# a quarter of an hour on two cores. FUZZ_SCALE=10 takes ten times as long (and all query shapes),
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
