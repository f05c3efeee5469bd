# Everything here works in a fresh clone: `scripts/setup` sees to what is missing.
.DEFAULT_GOAL := help
.PHONY: help demo build test check fmt bench

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 10

demo: ## a streaming backend, sidegate before it, and three curl lines to try
	@scripts/setup demo
	cargo run --release -- demo

build: ## the release binary, target/release/sidegate
	@scripts/setup demo
	cargo build --release

test: ## unit, documentation and end-to-end tests
	@scripts/setup test
	cargo test

check: ## all that a change must pass: format, lints, tests, documentation, licences
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings
	@$(MAKE) --no-print-directory test
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps
	@if cargo deny --version >/dev/null 2>&1; then cargo deny check; \
	else echo "cargo-deny is not installed: licences and advisories were not checked"; fi

fmt: ## formats the code
	cargo fmt

bench: ## this proxy beside nginx and HAProxy, in turns on this machine
	@scripts/setup bench
	cargo build --release
	benches/compare/run
