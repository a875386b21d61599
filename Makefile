# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
TRANSFORMERS ?= 5.23.0
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BUILT := $(VENV)/.built

.PHONY: demo test test-kernels test-slow lint types bench bench-quick gpu train clean

# The demo continues a long text through a cache that holds a quarter of it on the device.
# MODEL=smollm2 or gemma3-270m (downloaded once: eval/get_model.py), org/name or a folder;
# PROMPT=file, ASK="a question?", TOKENS=64, CHUNK=1024 change what it runs.
GOT := $(filter smollm2 gemma3-270m,$(MODEL))
demo: $(BUILT)
	$(if $(GOT),model=$$($(BIN)/python eval/get_model.py $(GOT)) &&) \
	$(BIN)/python examples/long_document.py \
		$(if $(MODEL),--model $(if $(GOT),"$$model",$(MODEL))) \
		$(if $(PROMPT)$(GOT),--prompt $(or $(PROMPT),python-reference)) \
		$(if $(ASK),--ask "$(ASK)") $(if $(TOKENS),--new-tokens $(TOKENS)) \
		$(if $(CHUNK),--chunk $(CHUNK))

test: $(BUILT) lint types
	$(BIN)/python -m pytest

# Tokens under every other kernel that this machine can run; tests/kernels goes through all by itself.
test-kernels: $(BUILT)
	for kernel in $$($(BIN)/python -c "from hf_tiered_cache.kernels import ops; \
			print(*ops.available_kernels()[1:])"); do \
		HF_TIERED_CACHE_KERNEL=$$kernel $(BIN)/python -m pytest -k greedy \
			tests/test_families.py tests/test_generate_parity.py || exit 1; \
	done

test-slow: $(BUILT)
	$(BIN)/python -m pytest -m "slow or not slow"

lint: $(BUILT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(BUILT)
	$(BIN)/mypy

bench: $(BUILT)
	$(BIN)/python eval/bench_kernels.py
	$(BIN)/python eval/bench_tiers.py --record-kib 256 1024 --threads 4 --rounds 3 --file-mib 1024 \
		--sample-mib 256
	$(BIN)/python eval/bench_generate.py
	$(BIN)/python eval/bench_offload.py
	$(BIN)/python eval/bench_overhead.py
	$(BIN)/python eval/bench_startup.py

bench-quick: $(BUILT)
	$(BIN)/python eval/bench_kernels.py --quick
	$(BIN)/python eval/bench_generate.py --quick
	$(BIN)/python eval/bench_offload.py --quick

# For a machine with a GPU, where everything needed is installed already: builds in place for that
# machine's own GPU (a build that fails is a row, and plain torch is measured), makes no environment,
# downloads nothing. GPU="--json path --log-dir dir --quick" is passed on.
gpu:
	PYTHONPATH=. $(PYTHON) eval/bench_gpu.py $(GPU)

# Trains the byte-level model in eval/tiny_lm again; about an hour on two cores.
train: $(BUILT)
	$(BIN)/python eval/train_tiny_lm.py

# torch and transformers first and pinned: asked for in one go with the rest, the index may
# resolve torch to another build.
$(READY):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==$(TORCH)
	$(BIN)/python -m pip install --quiet transformers==$(TRANSFORMERS)
	touch $@

# Compiles the extension into the source tree. While working on csrc/,
# `python setup.py build_ext --inplace` compiles only what changed.
$(BUILT): $(READY) pyproject.toml setup.py $(shell find csrc -type f 2>/dev/null)
	$(BIN)/python -m pip install --quiet --editable ".[eval,test,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info hf_tiered_cache/*.so
	find . -name __pycache__ -prune -exec rm -rf {} +
