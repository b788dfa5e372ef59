# make chat          a chat with the built-in demo model        make chat PROMPT="What is 17 + 25?"   one answer
# make serve         a server with the built-in demo model      make serve MODEL=/models/Kimi-K2.6    with another one
# make test          the tests                                  make check                            lint, format, types, layers
# make check-native  the native tests under the sanitizers and valgrind
# make bench         the benchmarks                             make clean                            remove what was built
PYTHON ?= python3
MODEL  ?= demo
VENV   := .venv
PIP    := $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
# What an extra of pyproject.toml needs on this machine, without building the project once more.
requirements = $(VENV)/bin/python -c 'from importlib.metadata import requires; \
    from packaging.requirements import Requirement; \
    print(*(f"{r.name}{r.specifier}" for r in map(Requirement, requires("hybrid-k2")) \
            if r.marker and r.marker.evaluate({"extra": "$(1)"}) and not r.marker.evaluate({"extra": ""})))'
NATIVE := setup.py pyproject.toml constraints.txt $(shell find csrc -type f)

.PHONY: chat serve test check check-native bench clean install
.DELETE_ON_ERROR:
export PROMPT

chat: $(VENV)/.installed
	@$(VENV)/bin/hybrid-k2 chat $(MODEL) $(if $(PROMPT),--prompt "$$PROMPT") $(ARGS)

serve: $(VENV)/.installed-serve
	@$(VENV)/bin/hybrid-k2 serve $(MODEL) $(ARGS)

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest $(ARGS)

check: $(VENV)/.installed-test $(VENV)/.installed-check
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest tests/test_layers.py

check-native: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest tests/native -m check_native -rs $(ARGS)

bench: $(VENV)/.installed
	$(VENV)/bin/hybrid-k2 bench experts

install: $(VENV)/.installed

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "error: hybrid-k2 needs Python 3.10 or newer; set PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	    || { rm -rf $(VENV); echo "error: $(PYTHON) cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }

$(VENV)/.installed: $(VENV)/bin/python $(NATIVE)
	@echo "Installing hybrid-k2 and what it needs into $(VENV) (a few minutes the first time) ..." >&2
	@$(PIP) setuptools wheel pybind11 packaging
	@$(PIP) --no-build-isolation -e .
	@$(PIP) $$($(call requirements,images))
	@touch $@

$(VENV)/.installed-serve: $(VENV)/.installed
	@$(PIP) $$($(call requirements,serve))
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed-serve
	@$(PIP) $$($(call requirements,test))
	@touch $@

$(VENV)/.installed-check: $(VENV)/.installed
	@$(PIP) $$($(call requirements,check))
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info hybrid_k2/_native*.so
