# The tools of the active environment (pip install -e '.[test]').
PYTHON ?= python
SOURCES := setup.cfg pyproject.toml $(shell find pyro_sparse models guides -name '*.py')
FLAT := build/flat

.PHONY: help lint format types imports test kills examples docs wheel ci clean

help:
	@echo "lint      ruff: rules and formatting"
	@echo "format    rewrite the code with ruff"
	@echo "types     mypy"
	@echo "imports   the direction of the dependencies between the subpackages"
	@echo "test      the test suite"
	@echo "kills     a run that is killed twenty times, at random moments, ends as if it never was"
	@echo "examples  the Python blocks of README.md and docs/, and the tutorials"
	@echo "docs      the API reference, in build/docs (needs the extra 'docs')"
	@echo "wheel     source distribution and wheel, in dist/"
	@echo "ci        everything that continuous integration runs, in an environment of its own"

lint:
	ruff check .
	ruff format --check .

format:
	ruff check --fix .
	ruff format .

# The package as a user has it, which is the only form in which static tools see pyro_sparse.models and
# pyro_sparse.guides. The wheel is built from the source distribution, so that is checked as well.
# build/ goes first: setuptools would carry deleted modules over from an older build.
$(FLAT): $(SOURCES)
	rm -rf build dist
	$(PYTHON) -m build --outdir dist . > /dev/null
	$(PYTHON) -m pip install --quiet --no-deps --target $(FLAT) dist/*.whl
	touch $(FLAT)

wheel: $(FLAT)

types: $(FLAT)
	cd $(FLAT) && mypy --config-file ../../pyproject.toml -p pyro_sparse

imports: $(FLAT)
	cd $(FLAT) && lint-imports --config ../../pyproject.toml

test:
	pytest -n 2

kills:
	pytest -m kills

examples:
	pytest -n 2 -m examples

docs: $(FLAT)
	PYTHONPATH=$(FLAT) pdoc --docformat google --output-directory build/docs pyro_sparse

ci:
	.ci/run

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
