# make setup   a virtual environment in .venv with everything        make lint    ruff, mypy, import directions
# make demo    the main job on text and speech made on the spot      make build   wheel and sdist in dist/
# make test    set up and run the tests                              make clean   remove what make made, .venv aside
#
# PYTHON=python3.12 make setup   chooses the interpreter (3.10 or newer).
# make bench-rescore speed of rescoring on this processor (a quarter of an hour; MIXBITS_DATA).
# make bench-speed   speed of packed models on this processor (minutes; benchmarks/README.md); BENCH_ARGS="--rounds 5" adds arguments.
# TEST_ARGS="-k wer" make test   passes arguments to pytest.  TEST_WORKERS=4 uses more processes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The compiled kernels: installing again builds them again.
NATIVE := CMakeLists.txt $(wildcard src/mixbits/kernels/csrc/*)
TEST_WORKERS ?= 2
TEST_ARGS ?=
BENCH_ARGS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -qq --constraint constraints.txt

.PHONY: setup demo test lint build bench-speed bench-rescore clean distclean
.DELETE_ON_ERROR:

setup: $(VENV)/.installed-all

# A stamp file says what was installed and when, so that a second run takes no time and a changed pyproject.toml or
# constraints.txt installs again. The demo needs less than development does; having everything is also enough for it.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "mixbits needs Python 3.10 or newer; $(PYTHON) is: $$($(PYTHON) --version 2>&1)." \
	       "Choose another one, e.g.: PYTHON=python3.12 make setup" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "could not make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

$(VENV)/.installed-all: pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	@echo "installing mixbits and its tools into $(VENV) (a few minutes the first time)"
	@$(INSTALL) --editable '.[dev,demo]'
	@touch $(VENV)/.installed-demo $@

$(VENV)/.installed-demo: pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	@echo "installing mixbits into $(VENV) (a few minutes the first time)"
	@$(INSTALL) --editable '.[demo]'
	@touch $@

demo: $(VENV)/.installed-demo
	@$(BIN)/python -m demo.run

# One thread per process: several processes with several threads each would only wait for each other.
test: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n $(TEST_WORKERS) $(TEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

build: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist . > /dev/null
	@ls -l dist

# Speed and memory against PyTorch (and llama.cpp: benchmarks/README.md); needs an idle machine.
bench-speed: setup
	$(BIN)/python benchmarks/bench_speed.py $(BENCH_ARGS) --output results/speed.json

# Rescoring n-best lists against padded batches (benchmarks/README.md); needs MIXBITS_DATA and an idle machine.
bench-rescore: setup
	$(BIN)/python benchmarks/bench_rescore.py $(BENCH_ARGS) --output results/rescore.json

clean:
	rm -rf dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache src/*.egg-info
	rm -rf .cmake .ninja_deps .ninja_log .skbuild-info.json CMakeCache.txt CMakeFiles CMakeInit.txt build.ninja cmake_install.cmake
	find src tests demo benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
