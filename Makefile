PYTHON ?= python3

.PHONY: demo docs test test-slow

demo: .venv/installed  ## set up, then train and prune the embedded digits (CPU, seconds)
	OMP_NUM_THREADS=1 .venv/bin/python train.py pruning=global_unstructured

test: .venv/installed  ## set up, then run the tests that take seconds
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --dist loadfile -m "not slow"

test-slow: .venv/installed  ## the others: browsers, wheels, notebooks, killed runs
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --dist loadfile -m slow

docs: .venv/installed  ## set up, then build the site into build/site, strictly
	.venv/bin/python docs/build.py

.venv/installed: pyproject.toml constraints.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements-dev.txt
	touch $@
