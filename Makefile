# `make demo` and `make test` need nothing but Rust and python3; they install or name what is missing.

# Outside the clone, so that a fresh clone does not compile RocksDB again.
export CARGO_TARGET_DIR ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/stemkv/target

# One profile for everything: RocksDB's C++ takes a quarter of an hour for each.
# And always the whole workspace where RocksDB is in it: Cargo unites the features of what it builds
# together, and a part of the workspace would want RocksDB compiled once more.
CARGO := cargo
PROFILE := --release
CLIPPY := $(CARGO) clippy $(PROFILE) --all-targets --quiet
DENY := -- -D warnings

.PHONY: demo serve cli test check unit crash bench bench-disk bench-peers setup help

help:
	@printf '%s\n' \
	  'make demo    a real model answers with reused KV from RAM and from disk; compares and times it' \
	  'make serve   starts the OpenAI-compatible server and prints a line to try' \
	  'make cli     builds the command line and prints where it is' \
  'make test    format, lints, docs and all tests' \
	  'make crash   the long crash tests: every power cut, a thousand kills' \
	  'make bench   the figures of docs/benchmarks.md on this machine' \
	  'make bench-disk DIR=…   what the disk of that folder can do, and what stemkv makes of it: ten minutes' \
	  'make bench-peers DIR=…   the index and the disk tier beside their peers'

setup:
	@tools/setup

SERVE := $(CARGO_TARGET_DIR)/release/stemkv-serve

demo: setup
	@$(CARGO) build $(PROFILE) --workspace --bin stemkv-serve
	@model=$$(tools/fetch-model) && $(SERVE) demo --model "$$model"

serve: setup
	@$(CARGO) build $(PROFILE) --workspace --bin stemkv-serve
	@model=$$(tools/fetch-model) && $(SERVE) serve --model "$$model"

cli: setup
	@$(CARGO) build $(PROFILE) --workspace --bin stemkv
	@printf '%s\n' "$(CARGO_TARGET_DIR)/release/stemkv"

test: setup check unit

check:
	$(CARGO) fmt --all --check
	$(CLIPPY) --workspace $(DENY)
	$(CLIPPY) --workspace --all-features $(DENY)
	$(CLIPPY) -p stemkv -p stemkv-store --no-default-features $(DENY)
	$(CLIPPY) -p stemkv -p stemkv-store --no-default-features --features sim $(DENY)
	$(CLIPPY) --workspace --no-default-features $(DENY)
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc $(PROFILE) --workspace --all-features --no-deps --quiet

unit:
	$(CARGO) test $(PROFILE) --workspace --all-features

crash: setup
	STEMKV_CRASH=all STEMKV_KILLS=1000 $(CARGO) test $(PROFILE) --workspace --all-features \
	    --test power_cut --test recovery --test rocks_faults \
	    --test rocks_io_faults -- --nocapture

bench: setup
	$(CARGO) bench --workspace --bench index
	$(CARGO) bench -p stemkv --no-default-features --bench host
	model=$$(tools/fetch-model) && $(CARGO) bench --workspace --bench codec -- --model "$$model"
	@$(MAKE) --no-print-directory demo

DIR ?= /tmp
# About 14 GiB below DIR, removed at the end; on an otherwise idle machine. Three programs, one table, in less than ten
# minutes on a disk of 1 to 2 GB/s. Each topic
# prints what it found as soon as it ends; where the run is interrupted, `… table` below prints what there is.
BENCH_DISK = --dir "$(abspath $(DIR))" --rows "$(abspath $(DIR))/stemkv-bench-rows"
bench-disk: setup
	@rm -f "$(DIR)/stemkv-bench-rows"
	$(CARGO) bench --workspace --bench disk --bench verify -- $(BENCH_DISK)
	model=$$(tools/fetch-model) && \
	    $(CARGO) bench --workspace --bench codec -- $(BENCH_DISK) --model "$$model"
	@$(CARGO) bench --quiet --workspace --bench disk -- $(BENCH_DISK) table
	@rm -f "$(DIR)/stemkv-bench-rows"

# The index beside kvbm-logical and dynamo-kv-router, and the disk tier beside foyer, RocksDB and files.
# The peers have a target folder of their own: what they ask of RocksDB's build must not make the
# workspace's stale. They link the library that is there; without one they compile it once more.
ROCKSDB_BUILT = $(firstword $(wildcard $(CARGO_TARGET_DIR)/release/build/librocksdb-sys-*/out/librocksdb.a))
PEERS = cd benches/peers && CARGO_TARGET_DIR="$(CARGO_TARGET_DIR)/peers" \
    $(if $(ROCKSDB_BUILT),ROCKSDB_LIB_DIR="$(dir $(ROCKSDB_BUILT))" ROCKSDB_STATIC=1) $(CARGO) run --release

bench-peers: setup
	$(PEERS) -- --bench
	$(PEERS) --bin disk -- --bench --dir "$(DIR)"
