# `make demo` and `make test` do all their own set-up; see README.md.
CARGO ?= cargo

.PHONY: demo test bench lint fmt

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

test: lint
	$(CARGO) test --workspace --doc --locked
	$(CARGO) nextest run --workspace --locked --no-tests=fail
