# Start with `make demo` or `make test`. Each target first installs what it needs into .venv, vLLM too.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# The vLLM targets create an environment for CPUs. Set this to use another Python that has vllm and kara-kernels.
VLLM_PYTHON ?= $(VENV)/vllm/bin/python
# One thread per process: test workers share the cores, and spinning threads make a busy machine many times slower.
SINGLE := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# These measure time or memory. Nothing runs beside them.
TIMED := tests/test_cost.py tests/test_overhead.py
TIMED_VLLM := tests/with_vllm/test_speed.py

.DEFAULT_GOAL := help
.PHONY: help demo demo-vllm demo-contexts quality reasoning codegen traffic contexts profile bench docs test test-vllm lint clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

demo: $(VENV)/.demo ## decode with a small model while its KV cache shrinks (ARGS="--help" lists options)
	$(BIN)/python -m demos.generate $(ARGS)

demo-vllm: $(VLLM_PYTHON) ## serve with vLLM, with and without Kara, and compare (ARGS="--help" lists options)
	$(VLLM_PYTHON) -m demos.serve $(ARGS)

demo-contexts: $(VLLM_PYTHON) ## serve documents again and again, kept in several ways, and compare (ARGS="--help" lists options)
	$(VLLM_PYTHON) -m demos.contexts $(ARGS)

quality: $(VENV)/.demo ## compare Kara with other methods, two hours on one core (ARGS="--quick": 5 minutes)
	$(BIN)/python -m bench.quality $(ARGS)

reasoning: $(VLLM_PYTHON) ## ask a served model problems with known answers, by method (ARGS="--quick": half an hour)
	$(VLLM_PYTHON) -m bench.reasoning $(ARGS)

codegen: $(VENV)/.dev ## compile every kernel for six GPUs; writes bench/results/codegen.md (ten minutes)
	$(BIN)/python -m bench.codegen $(ARGS)

bench: $(VENV)/.dev ## time one compression on this CPU; writes bench/results/speed.md (ten to twenty-five minutes)
	$(BIN)/python -m bench.speed $(ARGS)

traffic: $(VENV)/.dev ## count bytes and operations of compiled kernels in an emulator, and model GPU times
	$(BIN)/python -m bench.traffic $(ARGS)
	$(BIN)/python -m bench.traffic.predict

profile: $(VENV)/.demo ## measure the profile that `make contexts` simulates, of sixty texts (forty minutes)
	mkdir -p build
	$(BIN)/python -m bench.contexts.texts > build/contexts.jsonl
	$(BIN)/python -m kara_kernels.contexts profile "$$($(BIN)/python -m demos.model)" build/contexts.jsonl \
		--methods kara_sampled/int8,compactor/int8,snapkv/int8,keydiff/exact,knorm/exact,snapkv/exact \
		-o bench/results/profile.json --threads 1 --tier ram=ram --tier disk=build $(ARGS)

contexts: $(VENV)/.demo ## simulate contexts in storage tiers, with a measured profile (twelve minutes)
	$(BIN)/python -m bench.contexts $(ARGS)

docs: $(VENV)/.dev ## build the documentation site in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "To read it with search: $(BIN)/python -m http.server -d build/site"

test: $(VENV)/.dev ## run all tests except those of vLLM: interpreted, compiled, timed
	$(SINGLE) TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 25 $(TIMED:%=--ignore %) tests
	$(SINGLE) TRITON_INTERPRET=0 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/test_kernels.py tests/test_compiled.py tests/test_launch.py tests/test_repeat.py tests/test_pack.py tests/test_rank.py tests/test_ahead.py tests/test_payload.py tests/test_payload_emulated.py tests/test_channels.py tests/test_checksum.py tests/test_emulated.py tests/test_codegen.py tests/test_traffic.py tests/test_gpu.py
	$(SINGLE) TRITON_INTERPRET=0 $(BIN)/python -m pytest $(TIMED)

test-vllm: $(VLLM_PYTHON) ## test the plugin inside vLLM
	$(VLLM_PYTHON) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 25 $(TIMED_VLLM:%=--ignore %) tests/with_vllm
	$(VLLM_PYTHON) -m pytest $(TIMED_VLLM)

lint: $(VENV)/.dev ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove the virtual environment and the caches of tools
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

# 4 GB once per user, in ~/.cache/kara_kernels. This checkout adds only itself.
$(VENV)/vllm/bin/python: $(VENV)/.venv pyproject.toml demos/environment.py
	$(BIN)/python -m demos.environment $(VENV)/vllm
	@touch -h $@
