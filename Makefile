# `make demo` and `make test` do all their own set-up; see README.md.
CARGO ?= cargo

.PHONY: demo test lint fmt fuzz setup-build setup-test

# A private Postgres with sample data, the server, and a page of live queries.
demo: setup-build
	$(CARGO) build --release --locked
	exec target/release/zeroring demo

# Lints, doc tests, then every test; ends with the runner's summary.
test: setup-test lint
	$(CARGO) test --workspace --doc --locked
	$(CARGO) nextest run --workspace --locked --no-tests=fail

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

fmt:
	$(CARGO) fmt --all

setup-build:
	scripts/setup.sh build

setup-test:
	scripts/setup.sh test
