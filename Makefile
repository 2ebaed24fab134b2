# Each verb sets up what it needs, in .venv. CI calls these very verbs (.ci/run).
#   make demo    generate with the bundled model
#   make test    the tests, on both cores (ARGS="-k words" passes options to pytest)
#   make browser  install Chromium, for the test of the server's page (Debian, as root; without it, that test is skipped)
#   make check   ruff, pyright, the layer contract
#   make native  compile the native library again (an install compiles it too)
#   make bench   throughput, latency and start-up of the bundled model on this machine
#   make bench-cpu        quire beside its peers on this CPU (ARGS="--minutes 8", repeated until it is whole)
#   make bench-cpu-peers  install those peers, each in a virtual environment under .bench
#   make docs    write the generated pages, check links
#   make soak    what takes long: random workloads, the whole fault matrix, thousands of odd requests, 10 minutes of load
#   make clean   remove .venv and caches

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
# Python files that are not in src.
REST := $(wildcard tests examples benchmarks tools docs csrc hatch_build.py)

.PHONY: demo test browser check native bench bench-cpu bench-cpu-peers docs soak clean setup

# One pip command, so that torch is resolved once, to the version in constraints.txt.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,test]'
	@touch $@

setup: $(STAMP)

demo: $(STAMP)
	$(BIN)/quire generate --chat --progress --temperature 0 --file examples/prompts.txt

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

browser:
	@command -v chromium > /dev/null || { test "$$(id -u)" = 0 && command -v apt-get > /dev/null \
	  && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium > /dev/null; } \
	  || echo "no Chromium could be installed: the test of the server's page will be skipped"

check: $(STAMP)
	$(BIN)/ruff check src $(REST)
	$(BIN)/ruff format --check src $(REST)
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

native: $(STAMP)
	$(BIN)/python csrc/build.py src/quire/ops/native/libquire.so

bench: $(STAMP)
	@for script in $(wildcard benchmarks/core/*.py); do echo "== $$script"; $(BIN)/python $$script || exit 1; done
	$(BIN)/quire bench throughput $(ARGS)
	$(BIN)/quire bench latency $(ARGS)
	$(BIN)/quire bench startup $(ARGS)

bench-cpu: $(STAMP)
	$(BIN)/python -m benchmarks.cpu.run $(ARGS)

bench-cpu-peers: $(STAMP)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.cpu.install $(ARGS)

docs: $(STAMP)
	$(BIN)/python docs/generate.py

soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --hypothesis-profile=soak \
		tests/sim tests/core tests/server/test_faults.py tests/server/test_schema.py $(ARGS)
	$(BIN)/python -m benchmarks.server.soak

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
