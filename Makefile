# Everything runs in .venv, made from constraints.txt. `make` alone explains itself.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help setup run test stress lab serve doctor bench docs readme clean

help:
	@echo 'make run [DATA=folder] [ENV=dev]  set up, run the twelve stages, print where the report is'
	@echo 'make test                         set up, run the tests but the slow ones; ends with: N passed, N failed'
	@echo 'make lab | serve | doctor | bench | docs | stress | readme | clean'

setup: $(READY)

$(READY): constraints.txt settings.ini setup.py
	@test -n "$(PYTHON)" || { echo 'Python 3.11 or newer is needed: install it, or say make PYTHON=/path/to/python'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@echo 'setting up .venv (some minutes, once)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip setuptools wheel
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $(READY)

run: $(READY)
	@$(BIN)/aerec run $(if $(DATA),--data '$(DATA)') $(if $(ENV),--env $(ENV))

test: $(READY)
	@$(BIN)/python tests/run.py

stress: $(READY)
	@STRESS=1 $(BIN)/python tests/run.py

lab: $(READY)
	@$(BIN)/jupyter lab nbs

serve: $(READY)
	@$(BIN)/aerec serve $(if $(ENV),--env $(ENV))

doctor: $(READY)
	@$(BIN)/aerec doctor $(if $(ENV),--env $(ENV))

bench: $(READY)
	@mkdir -p runs/bench
	@for nb in nbs/benchmarks/*.ipynb; do (cd nbs/benchmarks && ../../$(BIN)/papermill --no-progress-bar $$(basename $$nb) ../../runs/bench/$$(basename $$nb)) || exit 1; done
	@echo 'executed benchmarks: runs/bench/'

docs: $(READY)
	@$(BIN)/python -c "from aerec_nb.pipeline import build_docs; print('site:', build_docs('_docs'))"

readme: $(READY)
	@$(BIN)/python .ci/readme.py

clean:
	rm -rf runs .venv build dist _docs _proc *.egg-info .pytest_cache
