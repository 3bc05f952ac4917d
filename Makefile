# Every target brings what it needs into .venv first; repeated, that takes a tenth of a second.

# A python3 that already has vLLM (a GPU build) is used as it is.
PYTHON ?= $(shell python3 -c 'import importlib.metadata as m; m.version("vllm")' 2>/dev/null && echo python3 \
	|| command -v python3.11 || command -v python3)
RUN := .venv/bin/python
# Two files of tests side by side; `make test PARALLEL=` runs them one after the other.
PARALLEL ?= -n 2 --dist loadfile

.PHONY: help environment demo test test-slow test-gpu lint benchmark small-models clean

help:
	@echo "make demo [MODEL=folder]  quantize a Gemma 4 to INT8 and serve it, and to GGUF; report"
	@echo "          [PART=gguf]     one half of it: int8 or gguf"
	@echo "make test                 the tests (about 10 minutes on 2 cores)"
	@echo "make test-slow            the tests that take longer (about 50 minutes)"
	@echo "make test-gpu             the kernels on a CUDA or ROCm GPU"
	@echo "make lint                 ruff, mypy, typos"
	@echo "make benchmark            the quantizer beside AMD Quark and a plain copy"
	@echo "make small-models         train the small Gemma 4 checkpoints again"

environment:
	@$(PYTHON) environment/create.py

demo: environment
	@$(RUN) examples/demo.py $(if $(MODEL),--model "$(MODEL)") $(if $(PART),--part $(PART))

test: environment
	$(RUN) -m pytest -m "not slow and not gpu" $(PARALLEL) $(ARGS)

# What several files need is made before they run side by side.
test-slow: environment
	@$(PYTHON) environment/create.py --quark
	@$(RUN) environment/build_llama_cpp.py
	@$(RUN) environment/browser.py
	$(RUN) -m pytest -m "slow and not gpu" $(PARALLEL) $(ARGS)

test-gpu: environment
	$(RUN) -m pytest -m gpu tests/gpu $(ARGS)

lint: environment
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	.venv/bin/typos

benchmark: environment
	@$(PYTHON) environment/create.py --quark
	$(RUN) benchmarks/quantize_int8.py

small-models: environment
	$(RUN) examples/small_gemma4/build.py all

clean:
	rm -rf .venv .venv-quark build dist demo-output *.egg-info
