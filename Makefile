# Everything that is made lies in .venv/ and build/. `make` alone lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules --no-print-directory

# Start-up time is one of our figures: byte code is always written, and only the installed package is imported.
unexport PYTHONDONTWRITEBYTECODE PYTHONPATH PYTHONHOME

# The system's Python first: one in root's home directory cannot be run by the tests' ordinary user. Expanded when
# used, so after the packages are there. ensurepip is what Debian leaves out without python3-venv.
PYTHON ?= $(firstword $(foreach p,/usr/bin/python3 python3,$(shell $p -c \
  'import sys, venv, ensurepip; sys.version_info >= (3, 11) and print("$p")' 2>/dev/null)) python3)
CC := $(if $(filter default,$(origin CC)),gcc,$(CC))
CLANG ?= clang

# Debian packages: CORE builds Corral and runs the demo, TEST is what tests and benchmarks run inside sandboxes.
CORE_PACKAGES := gcc libc6-dev make python3-venv git openssh-client
TEST_PACKAGES := $(CORE_PACKAGES) acl bubblewrap chromium-headless-shell curl dbus-bin dbus-daemon dnsutils gdb golang-go \
  golang-golang-x-mod-dev iodine iproute2 iputils-ping less libcap2-bin libseccomp2 mariadb-server ncat \
  netcat-openbsd nftables nmap nodejs openssh-server perl postgresql procps python3-pip socat softhsm2 sqlite3 strace \
  tmux uidmap vim xz-utils
# Debian's npm is 300 packages, and does not go with a Node.js of another origin, which brings its own.
TEST_PACKAGES += $(if $(shell command -v npm),,npm)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
export PIP_ROOT_USER_ACTION := ignore

# Directories are part of the list so that a deleted file counts as a change too.
SOURCES := pyproject.toml meson.build LICENSE README.md $(shell find src -name __pycache__ -prune -o -print)
LINTED := $(wildcard src tests benchmarks examples)
TESTS := $(wildcard tests/unit tests/contain tests/e2e)
# What uses the one little internet that this machine can have. As root it runs after the same as an ordinary user, and
# all else that runs as root is beside both: of two processors neither is idle. The demo has a time to keep.
ONLINE := $(shell grep -lw 'internet: Internet' $(wildcard tests/contain/test_*.py) /dev/null) $(wildcard tests/e2e/test_demo.py)
# Beside what needs real sandboxes.
AS_USER := $(wildcard tests/e2e/test_agents.py)
BENCHMARKS := $(wildcard benchmarks/[!_]*.py)

LAUNCHER_C := $(wildcard src/launcher/*.c)
LAUNCHER_H := $(wildcard src/launcher/*.h)
PARSERS_C := $(filter-out src/launcher/main.c,$(LAUNCHER_C))
ASAN_LAUNCHER := build/corral-launcher-asan
FUZZERS := fuzz_plan fuzz_exec

C_FLAGS := -std=c11 -D_GNU_SOURCE= -Wall -Wextra -Werror -Wshadow -Wstrict-prototypes -Wformat=2 -Isrc/launcher
SANITIZE := -g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
SANITIZER_ENV := ASAN_OPTIONS=abort_on_error=1:detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1

CAN_LIBFUZZER = echo 'int LLVMFuzzerTestOneInput(const char *d, long n) { return !d && n; }' | \
  $(CLANG) -fsanitize=fuzzer,address,undefined -x c - -o /dev/null 2>/dev/null

FUZZ_SEED ?= 1
FUZZ_SMOKE ?= 20000
FUZZ_SECONDS ?= 60
PYTEST_ARGS ?=
# Made where it is missing; has no range of subordinate ids.
TEST_USER ?= corral-test

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: demo
demo: build/installed.stamp build/demo.stamp ## an unmodified agent works in a sandbox, then turns, and is stopped
	@$(BIN)/python examples/demo/demo.py --corral $(abspath $(BIN)/corral) --agent $(abspath build/demo-venv/bin/mini)

.PHONY: test
test: test-packages build/installed.stamp build/demo.stamp build/agents.stamp build/dev.stamp $(ASAN_LAUNCHER) ## lint, sanitizers, all tests
	@export CORRAL_ASAN_LAUNCHER=$(abspath $(ASAN_LAUNCHER)); \
	if [ "$$(id -u)" != 0 ]; then $(MAKE) lint sanitize; exec $(BIN)/python -m pytest $(PYTEST_ARGS) $(TESTS); fi; \
	status=0; set -m; \
	{ beside=0; $(MAKE) lint sanitize || beside=1; \
	  echo '== what needs no sandbox'; $(BIN)/python -m pytest $(PYTEST_ARGS) tests/unit || beside=1; \
	  echo '== real sandboxes and agents as root'; \
	  $(BIN)/python -m pytest $(PYTEST_ARGS) $(ONLINE:%=--ignore=%) tests/contain $(wildcard tests/e2e) || beside=1; \
	  exit $$beside; } >build/beside.log 2>&1 </dev/null & beside=$$!; set +m; \
	trap 'kill -- -$$beside 2>/dev/null || true' EXIT; \
	echo '== real sandboxes as an ordinary user'; \
	tests/as_user.sh $(TEST_USER) $(PYTEST_ARGS) tests/contain $(AS_USER) || status=1; \
	echo '== the gateway as root, and the demo'; \
	$(BIN)/python -m pytest $(PYTEST_ARGS) $(ONLINE) || status=1; \
	wait $$beside || status=1; trap - EXIT; \
	cat build/beside.log; \
	exit $$status

.PHONY: lint
lint: build/dev.stamp ## ruff, mypy --strict, import contracts
	@status=0; \
	echo '== ruff'; \
	$(BIN)/ruff check --quiet --output-format=concise --cache-dir build/ruff_cache $(LINTED) || status=1; \
	echo '== mypy'; \
	$(BIN)/mypy || status=1; \
	echo '== import contracts'; \
	PYTHONPATH=src $(BIN)/lint-imports --no-logo --cache-dir build/import_linter_cache || status=1; \
	exit $$status

.PHONY: sanitize
sanitize: $(ASAN_LAUNCHER) $(FUZZERS:%=build/%) ## the launcher's parsers under ASan and UBSan, on mutated inputs
	@echo '== launcher parsers under ASan and UBSan'
	@cd build; for fuzzer in $(FUZZERS); do \
	  $(SANITIZER_ENV) ./$$fuzzer -s $(FUZZ_SEED) -n $(FUZZ_SMOKE) $$(find ../tests/fuzz/corpus/$${fuzzer#fuzz_} \
	    -maxdepth 0 2>/dev/null || true); \
	done

.PHONY: bench
bench: test-packages build/installed.stamp build/dev.stamp build/litellm.stamp ## every figure, next to its peers; fails if one misses its bar
	@if [ "$$(id -u)" = 0 ]; then tests/as_user.sh $(TEST_USER); fi; status=0; \
	for benchmark in $(BENCHMARKS); do \
	  echo "== $$benchmark"; TEST_USER=$(TEST_USER) $(BIN)/python "$$benchmark" || status=1; \
	done; exit $$status

.PHONY: soak
soak: test-packages build/installed.stamp build/dev.stamp ## the tests that run for minutes to hours
	@if [ "$$(id -u)" = 0 ]; then \
	  echo '== as an ordinary user'; tests/as_user.sh $(TEST_USER) -m soak $(PYTEST_ARGS) tests/contain; \
	  echo '== as root'; \
	fi; \
	$(BIN)/python -m pytest -m soak $(PYTEST_ARGS) tests

.PHONY: fuzz
fuzz: clang-package build/installed.stamp ## fuzz the launcher's parsers (libFuzzer, FUZZ_SECONDS each), then the gateway's
	@if ! $(CAN_LIBFUZZER); then \
	  echo 'fuzz: no clang with libFuzzer: mutations without coverage feedback instead'; \
	  exec $(MAKE) sanitize FUZZ_SMOKE=2000000; \
	fi; \
	mkdir -p build/fuzz; \
	for fuzzer in $(FUZZERS); do \
	  $(CLANG) $(C_FLAGS) -g -O1 -fno-omit-frame-pointer -fsanitize=fuzzer,address,undefined \
	    -fno-sanitize-recover=all tests/fuzz/$$fuzzer.c $(PARSERS_C) -o build/fuzz/$$fuzzer; \
	  seeds=tests/fuzz/corpus/$${fuzzer#fuzz_}; found=build/fuzz/$$fuzzer.found; \
	  mkdir -p $$found; [ -d $$seeds ] || seeds=; \
	  echo "== $$fuzzer, $(FUZZ_SECONDS) s"; \
	  build/fuzz/$$fuzzer -max_total_time=$(FUZZ_SECONDS) -timeout=10 -print_final_stats=1 \
	    -artifact_prefix=build/fuzz/$$fuzzer- $$found $$seeds; \
	done
	@echo '== fuzz_gateway, $(FUZZ_SECONDS) s'; $(BIN)/python tests/fuzz/fuzz_gateway.py $(FUZZ_SECONDS) $(FUZZ_SEED)

.PHONY: clean
clean: ## remove everything that was made
	rm -rf build dist $(VENV) .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find src tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

# --- .venv

build/venv.stamp: | core-packages
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Corral needs Python 3.11 or newer")'
	@umask 022; mkdir -p build; echo '== .venv'; \
	$(PYTHON) -m venv $(VENV); \
	$(PIP) install --upgrade 'pip>=25.1'
	@touch $@

# The tools that build a wheel, then the wheel, installed as users get it: not editable.
build/builder.stamp: build/venv.stamp pyproject.toml
	@umask 022; $(PIP) install --group build
	@touch $@

build/installed.stamp: build/builder.stamp $(SOURCES)
	@umask 022; echo '== installing corral into $(VENV)'; \
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) install --no-build-isolation --config-settings=build-dir=build/wheel .; \
	$(BIN)/python -m compileall -q "$$($(BIN)/python -c \
	  'import sysconfig; print(sysconfig.get_path("platlib"))')/corral"
	@touch $@

# With the dependencies themselves, which mypy reads: lint must not need a launcher that compiles.
build/dev.stamp: build/venv.stamp pyproject.toml
	@umask 022; echo '== development tools'; $(PIP) install --group dev $$($(BIN)/python -c \
	  'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"])')
	@touch $@

build/demo.stamp: examples/demo/requirements.txt | build/venv.stamp
	@umask 022; echo '== build/demo-venv'; \
	$(BIN)/python -m venv --clear build/demo-venv; \
	build/demo-venv/bin/python -m pip --disable-pip-version-check -qq install -r $<
	@touch $@

# The proxy that the model broker is compared with; 500 MB, so only where figures are made.
build/litellm.stamp: | build/venv.stamp
	@umask 022; echo '== build/litellm-venv'; \
	$(BIN)/python -m venv --clear build/litellm-venv; \
	build/litellm-venv/bin/python -m pip --disable-pip-version-check -qq install 'litellm[proxy]'
	@touch $@

# Pinned by hash in the lock file. Their optional parts (pictures) and what they would run at installation are left out.
build/agents.stamp: tests/agents/package.json tests/agents/package-lock.json | test-packages
	@if ! command -v npm >/dev/null; then echo 'note: no npm: tests with its agents are skipped'; exit 0; fi; \
	umask 022; echo '== build/agents'; rm -rf build/agents; mkdir -p build/agents; \
	cp tests/agents/package.json tests/agents/package-lock.json build/agents; \
	npm ci --prefix build/agents --cache build/npm-cache --ignore-scripts --omit=optional --no-audit --no-fund \
	  --loglevel=error >build/agents.log 2>&1 </dev/null || { cat build/agents.log; exit 1; }; \
	rm -rf build/npm-cache build/agents.log; touch $@

# --- The launcher outside the wheel

$(ASAN_LAUNCHER): $(LAUNCHER_C) $(LAUNCHER_H) Makefile | core-packages
	@mkdir -p build
	$(CC) $(C_FLAGS) $(SANITIZE) $(LAUNCHER_C) -o $@

$(FUZZERS:%=build/%): build/%: tests/fuzz/%.c tests/fuzz/driver.c $(PARSERS_C) $(LAUNCHER_H) Makefile | core-packages
	@mkdir -p build
	$(CC) $(C_FLAGS) $(SANITIZE) $< tests/fuzz/driver.c $(PARSERS_C) -o $@

# --- Debian packages

# As root on Debian, installs those of $(1) that are missing; otherwise names them and goes on. Nothing that is
# installed here is started as a service.
define debian-packages
@command -v dpkg-query >/dev/null || exit 0; \
missing=; for package in $(1); do \
  [ "$$(dpkg-query -W -f='$${db:Status-Status}' $$package 2>/dev/null || true)" = installed ] || \
    missing="$$missing $$package"; \
done; \
[ -n "$$missing" ] || exit 0; \
if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
  echo "note: these Debian packages are missing, what needs them will fail or be skipped:$$missing"; exit 0; \
fi; \
echo "== installing Debian packages:$$missing"; \
if [ ! -e /usr/sbin/policy-rc.d ]; then \
  trap 'rm -f /usr/sbin/policy-rc.d' EXIT; \
  printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod 0755 /usr/sbin/policy-rc.d; \
fi; \
mkdir -p build; export DEBIAN_FRONTEND=noninteractive; \
{ apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing; } >build/packages.log 2>&1 \
  </dev/null && rm -f build/packages.log || \
  { tail -n 20 build/packages.log; echo "warning: could not install:$$missing; going on without"; }
endef

.PHONY: core-packages test-packages clang-package
core-packages:
	$(call debian-packages,$(CORE_PACKAGES))

test-packages:
	$(call debian-packages,$(TEST_PACKAGES))

clang-package: core-packages
	$(if $(shell $(CAN_LIBFUZZER) && echo yes),,$(call debian-packages,clang libclang-rt-dev))
