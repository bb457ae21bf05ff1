# Everything runs in virtual environments that `make setup` makes; nothing outside this directory is touched.
PYTHON ?= python3
VENV := .venv
CONSUMER := .venv-consumer
BIN := $(VENV)/bin

.PHONY: setup demo publish test test-clients fuzz lint bench bench-hub compile gpu clean

setup: $(VENV)/.ready $(CONSUMER)/.ready

# torch is named first and alone: left to a dependency's range, pip would take the newest CUDA build.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

# What a user of the kernel and of recipes/ has, and nothing of this repository. PEFT and Trainer import every one of these
# libraries that they find, so that it is here and not in $(VENV), where tests would wait for them.
$(CONSUMER)/.ready: constraints.txt
	$(PYTHON) -m venv $(CONSUMER)
	$(CONSUMER)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(CONSUMER)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt transformers peft kernels \
	    accelerate bitsandbytes torchao trl datasets matplotlib
	touch $@

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/zizmor --quiet --offline .github/workflows
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

# A file is one worker's: its fixtures are made once, and what ran in it before a test is the same in every run. The longest come
# first (tests/conftest.py).
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The Hub client's own tests, downloaded, against the embedded Hub: tests/clients has the lists of what they leave out.
test-clients: $(VENV)/.ready
	$(BIN)/python tests/clients/run.py

# Property tests on examples that no run has seen before; a failure prints how to repeat it.
fuzz: setup
	$(BIN)/python -m pytest -n 2 -m hypothesis --hypothesis-profile=random

publish: setup
	$(BIN)/python tools/demo

# The laptop's recipe, with the kernel and without: losses, time, memory, and what the trained model says.
demo: setup
	$(BIN)/kernelpress build
	LOCAL_KERNELS=org/scattermoe-lora=$(CURDIR)/build $(CONSUMER)/bin/python recipes/measure.py laptop --json build/laptop.json

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/compare.py
	$(BIN)/python benchmarks/compare_attention.py
	$(BIN)/python benchmarks/compare_mlp.py
	$(BIN)/python benchmarks/compare_loss.py
	$(BIN)/python benchmarks/compare_projections.py
	$(BIN)/python benchmarks/compare_quantized.py --cases small-nf4,small-float8,medium-nf4,medium-float8

bench-hub: $(VENV)/.ready
	$(BIN)/python benchmarks/hub.py
	$(BIN)/python benchmarks/build.py

# Every Triton kernel and tile configuration that ships, for every architecture; needs no GPU.
compile: $(VENV)/.ready
	$(BIN)/kernelpress compile

# All that needs a GPU, with any Python that has torch for it: `make gpu PYTHON=python3 GPU="--minutes 8 --wheels wheels"`.
gpu:
	$(PYTHON) benchmarks/gpu $(GPU)

clean:
	rm -rf build .hub $(VENV) $(CONSUMER)
