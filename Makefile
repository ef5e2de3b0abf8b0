# Two commands are all the set-up there is: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test soak check install clean

install: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# The main job on eight photographs that come with scikit-image and scikit-learn, with the model
# that is in the package; then a look at what was written.
demo: install
	rm -rf demo-features
	$(BIN)/python -m demo.photographs | xargs $(BIN)/packvit embed --out demo-features
	$(BIN)/python -m demo.look demo-features

test: install
	$(BIN)/python -m pytest -q

# What takes minutes or wants the network.
soak: install
	$(BIN)/python -m pytest -q --soak

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

clean:
	rm -rf .venv demo-features build *.egg-info
