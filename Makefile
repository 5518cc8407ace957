# Every target sets up what it needs in .venv; none of them touches anything outside this folder, except `hooks` and `browser`, which say so.
PYTHON ?= python3
# PyTorch's CPU index, say, for those who want it: make setup TORCH_INDEX=...
TORCH_INDEX ?=
BIN := .venv/bin
RUNS ?= runs
export IMECD_DATA ?= data

.PHONY: setup run test browser lab docs readme refresh bench hooks clean

setup: .venv/ready

.venv/ready: settings.ini setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e '.[dev]'
	touch $@

run: setup ## make the shop, train the models on it, print their table, write figures
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} MPLBACKEND=Agg $(BIN)/imecd demo $(RUNS)/demo

test: setup browser ## lint, notebooks, tests
	$(BIN)/ruff check imecd tests bench .ci setup.py nbs
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest -q -n 2 --dist loadfile

browser: setup ## Chromium for the tests of JupyterLab and of pages: Debian's where apt may install it, else Playwright's own; a test that finds neither says so
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -qq -y chromium; } >/dev/null 2>&1 || $(BIN)/playwright install chromium >/dev/null 2>&1 || true

lab: setup ## open the notebooks
	$(BIN)/jupyter lab nbs/index.ipynb

docs: setup ## the site in _docs: by quarto where it is installed, else plain pages
	$(BIN)/python .ci/docs.py site

readme: setup ## README.md from nbs/index.ipynb
	$(BIN)/python .ci/docs.py readme

refresh: setup ## run every notebook and store its outputs
	OMP_NUM_THREADS=1 $(BIN)/python .ci/refresh.py

bench: setup ## measure speed and memory, write bench/results.md and bench/results.json
	$(BIN)/python bench/run.py

hooks: setup ## git hooks for notebooks; nbdev's also writes Jupyter settings into your home folder
	$(BIN)/nbdev_install_hooks

clean: ## remove what can be made again, but neither data nor runs
	rm -rf .venv _proc _docs build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -o -name .ipynb_checkpoints | grep -v '^./.git/' | xargs rm -rf
