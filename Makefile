# Each target sets up what it needs and does nothing twice. PYTHON: any Python 3.11+.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := apot_fat models scripts tests
DEMO := result/demo

.PHONY: demo figures docs test lint types check toolchains silicon clean

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# progressive training end to end on the embedded digits; a second run finds its stages finished
demo: $(VENV)/.installed
	$(BIN)/python scripts/progressive.py --config configs/digits/resnet20_apot.toml --output $(DEMO)
	$(BIN)/python scripts/progressive.py --config configs/digits/resnet20_fat.toml --bits 4,3 \
		--init $(DEMO)/resnet20_32bit/model_best.pth.tar --output $(DEMO)

# the figures of README.md and checkpoints/README.md
figures: demo
	cp $(DEMO)/progressive.png .github/demo.png
	$(BIN)/python scripts/sweep.py --table checkpoints/cifar10_ablation.csv --figure .github/ablation.png > /dev/null
	$(BIN)/python scripts/sweep.py --table checkpoints/cifar10_budget.csv --baseline 'published, 48 epochs' \
		--seconds .github/seconds.png > /dev/null

# reference pages and guides, into site/
docs: $(VENV)/.installed
	$(BIN)/python scripts/docs.py site

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/.installed
	$(BIN)/mypy

check: lint types test

# Debian's compilers, emulators and synthesis that the slow tests of integer programs call; as root
toolchains:
	apt-get update
	apt-get install --yes --no-install-recommends gcc clang libclang-rt-dev gcc-riscv64-unknown-elf gcc-arm-none-eabi \
		qemu-user qemu-system-arm iverilog yosys

# the slow tests of integer programs
silicon: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow tests/integer tests/scripts/test_export_c.py

clean:
	rm -rf $(VENV) $(DEMO) site .pytest_cache .mypy_cache .ruff_cache
