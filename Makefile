PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
ARGS ?=
# with what the system's python3 finds besides
HERE := PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH}

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-tritons lint format bench bench-gpu bench-layers-gpu experiments-gpu gpu clean

help: ## list the commands
	@awk -F ': .*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.demo ## set up, then check parity and train the captioning demo; ARGS="--backend torch"
	$(PY) -m crossattn_kernels demo $(ARGS)

test: $(VENV)/.test ## set up, then run the tests; ARGS="-k masks"
	$(PY) -m pytest -n 2 --dist worksteal $(ARGS)

test-tritons: $(VENV)/triton-3.6.0 $(VENV)/triton-3.9.0 ## the kernels with torch 2.11's Triton and with the newest
	PYTHONPATH=$(VENV)/triton-3.6.0 $(PY) -m pytest -n 2 tests/test_compile.py tests/test_machine_code.py -k "not sm_80 and not sm_100 and not every_option"
	PYTHONPATH=$(VENV)/triton-3.6.0 $(PY) -m pytest -n 2 tests/test_launch.py tests/test_ptx.py
	PYTHONPATH=$(VENV)/triton-3.9.0 $(PY) -m pytest -n 2 --dist worksteal tests/test_kernels.py tests/test_kernels_hidden.py tests/test_kernel_functions.py tests/test_launch.py
	PYTHONPATH=$(VENV)/triton-3.9.0 $(PY) -m crossattn_kernels compile --arch sm_90 -k "two-pass bf16" --jobs 2

lint: $(VENV)/.test ## ruff and mypy, as in CI
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy crossattn_kernels

format: $(VENV)/.test ## let ruff rewrite the files
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

bench: $(VENV)/.bench ## time against PyTorch, in one run
	$(PY) -m pytest bench/ -p benchmark $(ARGS)

bench-gpu: ## time against every peer on an NVIDIA GPU with the system's python3; ARGS="--part masked", OUT=dir
	$(HERE) $(PYTHON) -m bench.run --device cuda $(if $(OUT),--out $(OUT)) $(ARGS)

bench-layers-gpu: ## layers and models beside the library's own on an NVIDIA GPU, with the system's python3; OUT=dir
	$(HERE) $(PYTHON) -m bench.layers --device cuda $(if $(OUT),--out $(OUT)) $(ARGS)

experiments-gpu: ## what was chosen beside what was not, on an NVIDIA GPU with the system's python3; OUT=dir
	$(HERE) $(PYTHON) -m bench.experiments $(if $(OUT),--out $(OUT)) $(ARGS)

gpu: ## parity on an NVIDIA GPU with the system's python3: nothing is installed; ARGS="-k media", OUT=dir
	$(HERE) $(PYTHON) tests/gpu.py $(if $(OUT),--out $(OUT)) $(ARGS)

clean: ## remove the environment, caches and builds
	rm -rf $(VENV) build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ensurepip writes pip last, so a venv that failed half-way is made again
$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

# one stamp per extra: .venv/.demo, .venv/.test, .venv/.bench
$(VENV)/.%: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[triton,$*]'
	@touch $@

# other versions lie beside the environment, where PYTHONPATH finds them first
$(VENV)/triton-%: | $(VENV)/.test
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target $@.part triton==$*
	@mv $@.part $@
