# Two commands do everything, each with its own set-up in .venv: `make study` and `make test`.
#   make study MODEL=tiny-bunny    the same on another study model
#   make study MODEL=smol-llava    the same on a real language model, whose weights are fetched first (93 MB)
#   make lab                       JupyterLab, open on the index with the reading order
#   make docs                      the documentation site, in _site
#   make test PYTHON=python3.12    another Python for the set-up (3.11 or newer)
#   make refresh NB=taylor SLOW=1  one notebook, its slow cells too

PYTHON ?= python3
TORCH  ?= torch==2.13.0
BIN    := .venv/bin
STAMP  := .venv/.installed
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: study test lab docs install refresh hooks clean

# The rows of this machine go to .study, beside those that came with the project in nbs/results.
study: export LVLM_RESULTS = $(CURDIR)/.study
study: $(STAMP)
	@[ "$(MODEL)" != smol-llava ] || $(BIN)/python -m pip install -qq -e '.[real]'
	@mkdir -p $(LVLM_RESULTS)
	@$(BIN)/lvlm_study run --preset quick --models "$(MODEL)"
	@$(BIN)/lvlm_study draw --models "$(MODEL)"
	@$(BIN)/lvlm_study show --models "$(MODEL)"
	@$(BIN)/lvlm_study check --models "$(MODEL)" || echo "Some runs fall outside the stored intervals (see the table above): another machine, other versions?"
	@echo "Rows and figures are in .study"

test: $(STAMP)
	@bash tests/check.sh

lab: $(STAMP)
	@$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/nbs/index.ipynb

docs: $(STAMP)
	@$(BIN)/python docs/build.py

refresh: $(STAMP)
	@$(BIN)/python tests/refresh.py $(NB) $(if $(SLOW),--slow)

hooks: $(STAMP)
	@$(BIN)/nbdev_install_hooks

install: $(STAMP)

# torch goes first and pinned, so that a CPU wheel lying on the machine is taken. -qq leaves pip only its errors.
$(STAMP): pyproject.toml
	@[ -x $(BIN)/python ] || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "lvlm_study needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv || \
	  { echo "$(PYTHON) -m venv failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; rm -rf .venv; exit 1; }
	@echo "Installing into .venv (a few minutes the first time)"
	@$(BIN)/python -m pip install -qq '$(TORCH)'
	@$(BIN)/python -m pip install -qq -e '.[dev,docs]'
	@touch $@

clean:
	@rm -rf _site _docs _proc build dist nbs/.last_checked nbs/nbdev.yml nbs/sidebar.yml .ruff_cache .pytest_cache
	@find lvlm_study nbs tests docs -name __pycache__ -prune -exec rm -rf {} + -o -name .ipynb_checkpoints -prune -exec rm -rf {} +
	@echo "Cleaned. The environment stays; remove it with: rm -rf .venv"
