# Each target needs only Python 3.11 and make: the environment is built on demand,
# and again only when pyproject.toml changes.
PYTHON ?= python3
READY := .venv/.installed

.PHONY: demo test lint docs wheel clean

demo: $(READY)
	.venv/bin/ddpm demo --out runs/demo

test: $(READY)
	.venv/bin/python -m pytest -n auto --dist loadfile

lint: $(READY)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

docs: $(READY)
	.venv/bin/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

# What is released, tried in an environment that has nothing else, away from this folder.
wheel: $(READY)
	rm -rf dist build/wheel
	.venv/bin/python -m build --outdir dist .
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet dist/*.whl
	cd build && wheel/bin/ddpm sample mnist --num-images 4 --sampler dpmpp --num-steps 5 --out wheel/digits.png
	cd build && wheel/bin/ddpm evaluate digits:test --reference digits:train --features classifier --metrics fid --bootstrap 0
	cd build && wheel/bin/ddpm demo --out wheel/demo
	ls -l dist

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; name one with make PYTHON=...")'
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --quiet --editable '.[all,dev]'
	touch $@

clean:
	rm -rf .venv dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
