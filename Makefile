# Every command of this project. `make` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

export CARGO_TARGET_DIR ?= $(CURDIR)/target
# Queries are checked against .sqlx, so that a build needs no database; DATABASE_URL in the environment changes nothing.
export SQLX_OFFLINE := true
# Where rustup puts cargo; a shell that was opened before that does not know it yet.
export PATH := $(PATH):$(HOME)/.cargo/bin
DATA_DIR ?= /var/lib/mayfly

.PHONY: help
help: ## list these commands
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

.PHONY: setup
setup: ## install the system packages and the service user (does nothing when all is there)
	@tools/setup.sh run

.PHONY: build
build: ## build everything, optimised
	@tools/setup.sh build
	cargo build --workspace --release --locked

.PHONY: run
run: ## set up, build, start the service, do a first run, serve until Ctrl-C (DATA_DIR=/var/lib/mayfly)
	@DATA_DIR='$(DATA_DIR)' tools/run.sh

.PHONY: dashboard
dashboard: ## show the boards with live figures of the service that runs, until Ctrl-C (METRICS_LISTEN=127.0.0.1:9464 PROMETHEUS_LISTEN=127.0.0.1:9090)
	@DATA_DIR='$(DATA_DIR)' tools/dashboard.sh

.PHONY: test
test: ## run all tests that this machine can run (ARGS='--test limits' for some)
	@tools/test.sh $(ARGS)

.PHONY: test-crash
test-crash: ## kill service, keeper and Postgres more than 200 times under load, make 10,000 runs, and print what was counted (ARGS=NAME for some)
	@tools/test-crash.sh $(ARGS)

.PHONY: test-vm
test-vm: ## the keeper's tests in emulated machines with Linux 6.1 and pure cgroup v2, with AppArmor and with SELinux (part of make test; ARGS=limits for some)
	@tools/test-vm.sh $(ARGS)

.PHONY: check
check: ## format, lints, licences, sources and (where their database can be had) known faults of dependencies, documentation, shell scripts
	@tools/setup.sh check
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS='-D warnings -A rustdoc::private_intra_doc_links' cargo doc --workspace --no-deps --document-private-items --locked --quiet
	cargo fetch --locked --quiet
	cargo deny --offline --all-features check licenses bans sources
	@tools/advisories.sh
	shellcheck -x .ci/run tools/*.sh images/*.sh images/*/build.sh

.PHONY: load
load: ## put load on a service that is started for it: report, JSON and pictures in target/load (ARGS='burst sustained --at-once 16' for some shapes, ARGS=--help for all)
	@tools/load.sh $(ARGS)

.PHONY: bench
bench: ## measure what we promise, and runs beside bubblewrap, crun, runc, gVisor and Docker; writes docs/performance.md (RUNS=50 for a short look)
	@tools/bench.sh $(ARGS)

.PHONY: bench-micro
bench-micro: ## measure parts by themselves: launch phases, log records, unpacking, admission (ARGS=launch for some)
	@tools/bench-micro.sh $(ARGS)

.PHONY: bench-unpack
bench-unpack: ## measure the unpacking of a layer of 500 MB beside tar, and fail if it takes more than half as long again
	cargo run --release --locked --package sandbox-core --example unpack_beside_tar

.PHONY: images
images: ## build the starter images that are not built yet, and print where they are
	@tools/setup.sh images
	@for recipe in images/*/build.sh; do "$$recipe"; done

.PHONY: image
image: ## build the image of a node from the Dockerfile, without a registry or a daemon, and print where it is (DEBIAN=bookworm, BASE_IMAGE=, OUT=)
	@tools/setup.sh image
	@tools/image.sh

.PHONY: fuzz
fuzz: ## have cargo-fuzz, which needs a nightly compiler, work on the unpacker of layers (ARGS=-max_total_time=3600)
	cargo +nightly fuzz run unpack -- $(or $(ARGS),-max_total_time=600)

.PHONY: db-prepare
db-prepare: ## check the SQL against a scratch database and renew .sqlx (after changing a query)
	@tools/db-prepare.sh

.PHONY: openapi
openapi: ## renew openapi.yaml from the code (after changing an operation or a schema)
	@cargo run --quiet --locked --package mayfly -- openapi >openapi.yaml.new && mv openapi.yaml.new openapi.yaml

.PHONY: clean
clean: ## remove what was built (images too, unless they are kept in XDG_CACHE_HOME)
	cargo clean
	rm -rf '$(CARGO_TARGET_DIR)/images'
