# Two commands matter: `make demo` and `make test`. Each sets up its own environment in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where pip looks for torch first; empty: its default index. README.md says when to set it.
TORCH_INDEX ?=
JOBS ?= auto
# Bytecode is written, or each of the many processes that tests start would compile the sources anew.
PYTEST = env -u PYTHONDONTWRITEBYTECODE $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
DEMO_OUT ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)

# make experiment NAME=fedrolex-mnist: run it, draw it, hold it against what theory and publications say
NAME ?= quickstart
OUT ?= runs/$(NAME)-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test test-all test-slow lint format reference proto experiment rivals bench faults clean

demo: $(VENV)/.installed
	$(BIN)/gossamer run experiments/quickstart/config.yaml --out $(DEMO_OUT)
	$(BIN)/gossamer plot $(DEMO_OUT) --spec experiments/quickstart/plot.yaml -o $(DEMO_OUT)/convergence.png

# The large sweeps are sampled, by a seed that changes with the commit; test-all runs every case.
test: $(VENV)/.installed lint
	$(PYTEST)

test-all: $(VENV)/.installed lint
	$(PYTEST) --all-sweeps

test-slow: $(VENV)/.installed
	$(PYTEST) --durations=30

experiment: $(VENV)/.installed
	$(BIN)/gossamer run experiments/$(NAME)/config.yaml --out $(OUT)
	$(BIN)/gossamer plot $(OUT) --spec experiments/$(NAME)/plot.yaml -o $(OUT)/convergence.png
	$(BIN)/python experiments/expect.py $(OUT) experiments/$(NAME)/expected.json

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# docs/reference.md, from docstrings and options; a test holds it up to date.
reference: $(VENV)/.installed
	$(BIN)/python -m gossamer.reports.reference docs/reference.md

# What is sent between machines. The compiler comes with `pip install -e .[proto]`; its output is committed.
proto: $(VENV)/.installed
	cd src && ../$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. gossamer/transport/gossamer.proto

# The rival frameworks need an environment of their own: they cap versions that gossamer does not.
rivals: .venv-rivals/.installed

bench: $(VENV)/.installed rivals
	$(BIN)/python benchmarks/federated_round.py
	$(BIN)/python benchmarks/many_small_clients.py
	$(BIN)/python benchmarks/mixed_capacities.py
	$(BIN)/python benchmarks/submodel.py
	$(BIN)/python benchmarks/smaug_step.py
	$(BIN)/python benchmarks/registered_clients.py
	$(BIN)/python benchmarks/kill_and_resume.py
	$(BIN)/python benchmarks/mixing.py
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/ray_overhead.py
	$(BIN)/python benchmarks/ray_peers.py
	$(BIN)/python benchmarks/actor_start.py
	$(BIN)/python benchmarks/collective.py
	$(BIN)/python benchmarks/transport.py
	$(BIN)/python benchmarks/network_round.py

# Kills actors, drivers and nodes of Ray runs, ranks of torchrun, and servers and clients, and compares bits; stops runs by
# signals, and times their end. Sends bad messages to a server.
faults: $(VENV)/.installed
	$(BIN)/python benchmarks/faults.py --faults 200
	$(BIN)/python benchmarks/faults.py --engine collective --faults 40
	$(BIN)/python benchmarks/faults.py --engine network --faults 200
	$(BIN)/python benchmarks/stopping.py
	$(BIN)/python tests/fuzz/messages.py --number 10000

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

.venv-rivals/.installed: benchmarks/rivals.txt
	$(PYTHON) -m venv .venv-rivals
	.venv-rivals/bin/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	.venv-rivals/bin/pip install --quiet -r benchmarks/rivals.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-rivals build .pytest_cache .mypy_cache .ruff_cache .hypothesis
