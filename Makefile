# make demo: compress a real language model; make test: run the tests; make quality: lint and format check; make style: format;
# make docs: build the site
PYTHON ?= python3
VENV := .venv
WORKERS ?= -n logical --maxprocesses 4 --dist loadfile
RECIPE := recipes/smollm2-135m-width/recipe.yaml

.PHONY: demo test quality style docs

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check --progress-bar on -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(VENV)/ready
	@$(VENV)/bin/python recipes/prepare_offline.py
	@$(VENV)/bin/hf-minitron run $(RECIPE)

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest $(WORKERS)

quality: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

style: $(VENV)/ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(VENV)/ready # strict: a broken link, an anchor or a name that is not there is an error
	@$(VENV)/bin/python -c "import material, mkdocstrings" 2>/dev/null || \
		$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet
	@echo "Site: build/site/index.html"
