# Two commands are all the set-up there is: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo pictures test soak check install dist clean

install: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# The main job on eight photographs that come with scikit-image and scikit-learn, with the model
# that is in the package; then a look at what was written,
# and a picture of what the model sees: demo-features.png.
demo: install
	rm -rf demo-features
	$(BIN)/python -m demo.photographs | xargs $(BIN)/packvit embed --out demo-features
	$(BIN)/python -m demo.look demo-features
	$(BIN)/python -m demo.photographs | xargs $(BIN)/packvit pca --layer 4 --out demo-features.png

# The pictures in README and the docs, by the model in the package as it is now.
pictures: install
	$(BIN)/python -m demo.picture docs/pictures/pack.png
	$(BIN)/python -m demo.photographs | xargs $(BIN)/packvit pca --layer 4 --width 1000 --out docs/pictures/pca.webp

# A process of tests on each core: each has a gigabyte of memory, so no more than four.
test: install
	$(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist worksteal

# What takes minutes or wants the network.
soak: install
	$(BIN)/python -m pytest -q --soak

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

clean:
	rm -rf .venv demo-features demo-features.png build dist *.egg-info

# The source distribution, and the wheel built from it: `pip install dist/packvit-*.whl`.
dist: install
	rm -rf dist
	$(BIN)/python -m build --no-isolation
