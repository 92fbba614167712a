# Everything that a developer does with taskd. `make help` lists it.
#
# Works on a fresh Debian or Ubuntu with Python 3.11+, python3-venv and make; all else goes into the virtual environment.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
# They wait for daemons and disks a third of their time.
TESTS_AT_ONCE ?= $(shell expr $(JOBS) \* 3 / 2)
SEED ?= 0
SEEDS ?= 100
N ?= 50000
MINUTES ?= 30
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test test-guest check format integration sim fuzz bench bench-run bench-takeover bench-depth bench-scale bench-check soak bench-flood binary deb clean

help: ## Show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "PYTHON=$(PYTHON)  which Python makes the virtual environment $(VENV)"
	@echo "JOBS=$(JOBS)  how many processors tests may use    ARGS=…  more arguments for pytest, the demo or the benchmarks"
	@echo "SEED=$(SEED), SEEDS=$(SEEDS)  which simulated clusters    N=$(N)  how many hostile frames"

demo: $(VENV)/.runs ## Two schedulers and three workers find each other and do real work; a worker and the leader are killed
	$(BIN)/python examples/demo.py $(ARGS)

test: check ## Everything: lint, types, layers, units, real daemons, a LAN of network namespaces where permitted
	$(BIN)/pytest -n $(TESTS_AT_ONCE) --dist loadfile -r s $(ARGS)

test-guest: $(VENV)/.develops ## Limits of tasks in a real cgroup v2: a guest of QEMU's, in a minute or two; skipped where there is none
	@$(BIN)/python -m tests.guest; code=$$?; [ $$code = 77 ] || exit $$code

check: $(VENV)/.develops ## Lint, format, types and import directions, in seconds
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet . || { echo "run: make format"; exit 1; }
	$(BIN)/mypy
	$(BIN)/pytest tests/test_layers.py

format: $(VENV)/.develops ## Bring the code into form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

integration: $(VENV)/.develops ## Only the tests with real daemons
	$(BIN)/pytest -r s tests/integration $(ARGS)

sim: $(VENV)/.develops ## Whole clusters in simulated time, with every kind of fault: SEEDS of them, from SEED on
	$(BIN)/python -m tests.sim --seed $(SEED) --seeds $(SEEDS) --jobs $(JOBS) $(ARGS)

fuzz: $(VENV)/.develops ## Hostile frames and messages into sessions and whole clusters: N of them, from SEED on
	$(BIN)/python -m tests.fuzz --seed $(SEED) --count $(N) --jobs $(JOBS) $(ARGS)

bench: bench-run bench-depth bench-scale ## All of the next three; some twenty minutes

bench-run: $(VENV)/.develops ## Throughput and latency, beside what the machine itself can do; two minutes
	$(BIN)/python -m bench.run $(ARGS)

bench-takeover: $(VENV)/.develops ## What a change of leaders costs, and what a standby costs; some ten minutes
	$(BIN)/python -m bench.takeover $(ARGS)

bench-depth: $(VENV)/.benches ## What long queues cost, up to five million: memory, rate, restart; some ten minutes
	$(BIN)/python -m bench.depth $(ARGS)

bench-scale: $(VENV)/.develops ## A leader and up to a thousand workers, and short tasks over many of them; some five minutes
	$(BIN)/python -m bench.scale $(ARGS)

bench-flood: $(VENV)/.develops ## What a flood of strangers at the peer port does to submissions; two minutes
	$(BIN)/python -m bench.flood $(ARGS)

soak: $(VENV)/.develops ## A cluster under load while a random daemon is killed every 30 s: half an hour, MINUTES=2 for less
	$(BIN)/python -m bench.soak --minutes $(MINUTES) $(ARGS)

bench-check: $(VENV)/.develops ## Whether the hot path costs what it did, as ratios that hold on any machine; half a minute
	$(BIN)/python -m bench.check $(ARGS)

binary: dist/taskd ## dist/taskd, one file that needs no Python, and dist/taskd-folder, the same as a folder that starts quicker
	@$(BIN)/python packaging/binary/measure.py dist/taskd dist/taskd-folder

deb: dist/taskd ## The Debian package in dist/: the program, units, users, settings, man pages, completions
	@$(BIN)/python packaging/deb.py --program dist/taskd-folder --output dist

venv: $(VENV)/.develops ## The virtual environment, anew where pyproject.toml has changed

clean: ## Remove what was made here, the virtual environment too
	rm -rf $(VENV) .demo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What goes into the executable. When none of it is newer, the executable is as it should be.
PACKAGED := $(shell find taskd systemd config packaging -type f ! -name '*.pyc' 2>/dev/null)

dist/taskd: $(PACKAGED) pyproject.toml | $(VENV)/.builds
	@echo "building dist/taskd and dist/taskd-folder; a minute"
	@rm -rf dist/taskd-folder
	$(BIN)/pyinstaller --noconfirm --log-level ERROR --distpath dist --workpath build/binary packaging/binary/taskd.spec
	@touch $@

# The stamps say what is installed: what the program needs to run, and on top of that what developing needs.
$(VENV)/.runs: pyproject.toml | $(VENV)/bin/pip
	@echo "installing taskd and what it needs into $(VENV)"
	$(PIP) install --editable .
	@touch $@

$(VENV)/.develops: pyproject.toml | $(VENV)/bin/pip
	@echo "installing taskd and what developing it needs into $(VENV)"
	$(PIP) install --editable '.[dev]'
	@touch $(VENV)/.runs $@

$(VENV)/.benches: pyproject.toml | $(VENV)/.develops
	@echo "installing what plots are drawn with into $(VENV)"
	$(PIP) install --editable '.[bench]'
	@touch $(VENV)/.runs $(VENV)/.develops $@

$(VENV)/.builds: pyproject.toml | $(VENV)/bin/pip
	@echo "installing PyInstaller and what taskd needs into $(VENV)"
	$(PIP) install --editable '.[binary]'
	@touch $(VENV)/.runs $@

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "taskd needs Python 3.11 or newer, as $(PYTHON); name another one: make PYTHON=python3.12 …"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
