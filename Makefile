# Everything a newcomer needs: `make demo` and `make test`. Each makes what it needs in .venv first, vLLM too.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# The vLLM targets make an environment for CPUs; name a Python that has vllm and kara-kernels to use that.
VLLM_PYTHON ?= $(VENV)/vllm/bin/python
# One thread each: test workers share the cores, and spinning threads on a loaded machine are many times slower.
SINGLE := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help demo demo-vllm quality codegen traffic bench docs test test-vllm lint clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

demo: $(VENV)/.demo ## watch a language model decode while its KV cache shrinks (ARGS="--help" for options)
	$(BIN)/python -m demos.generate $(ARGS)

demo-vllm: $(VLLM_PYTHON) ## serve with vLLM, without and with Kara, and compare (ARGS="--help" for options)
	$(VLLM_PYTHON) -m demos.serve $(ARGS)

quality: $(VENV)/.demo ## compare what methods keep of the meaning, an hour on 2 cores (ARGS="--quick": 5 minutes)
	$(BIN)/python -m bench.quality $(ARGS)

codegen: $(VENV)/.dev ## compile every kernel for six GPUs and write bench/results/codegen.md (ten minutes)
	$(BIN)/python -m bench.codegen $(ARGS)

bench: $(VENV)/.dev ## time an event on this CPU beside other ways to do it: bench/results/speed.md (ten minutes)
	$(BIN)/python -m bench.speed $(ARGS)

traffic: $(VENV)/.dev ## count bytes and operations of compiled kernels in an emulator, and what a model makes of them
	$(BIN)/python -m bench.traffic $(ARGS)
	$(BIN)/python -m bench.traffic.predict

docs: $(VENV)/.dev ## build the documentation as a site, into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "To read it with its search: $(BIN)/python -m http.server -d build/site"

test: $(VENV)/.dev ## run all tests: interpreted, compiled, timed
	$(SINGLE) TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests
	$(SINGLE) TRITON_INTERPRET=0 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/test_compiled.py tests/test_launch.py tests/test_emulated.py tests/test_codegen.py tests/test_traffic.py tests/test_gpu.py
	$(SINGLE) TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/test_cost.py tests/test_overhead.py

test-vllm: $(VLLM_PYTHON) ## test the vLLM plugin inside of vLLM
	$(VLLM_PYTHON) -m pytest tests/with_vllm

lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove the virtual environment and caches of the tools
	rm -rf $(VENV) .pytest_cache .hypothesis .mypy_cache .ruff_cache build *.egg-info

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "kara-kernels needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1): make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.venv pyproject.toml constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.venv pyproject.toml constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.demo

# 3.5 GB once per user, in ~/.cache/kara_kernels; this checkout adds only itself.
$(VENV)/vllm/bin/python: $(VENV)/.venv pyproject.toml demos/environment.py
	$(BIN)/python -m demos.environment $(VENV)/vllm
	@touch -h $@
