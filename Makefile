PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CORE := src/replknet/ops/libreplknet_core.so

.PHONY: demo test check bench install install-dev native format clean sanitize test-aarch64 wheel

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev
	@$(MAKE) --no-print-directory $(CORE)

$(VENV)/.installed: pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -e ".[dev,export,webdataset]"
	touch $@ $(VENV)/.installed

demo: install
	$(BIN)/replknet demo

# One thread: PyTorch's own sums over several are not repeatable, and some tests compare bit for bit.
check: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m "not slow"

test: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --cov --cov-report=term
	$(MAKE) sanitize

native: install-dev

# The native core alone, when its sources are newer than what was installed; an editable install finds it.
$(CORE): CMakeLists.txt $(wildcard csrc/*)
	$(BIN)/cmake -S . -B build/dev -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja
	$(BIN)/cmake --build build/dev
	test ! -e $@ || touch $@

# The native core under AddressSanitizer and UndefinedBehaviorSanitizer, against sums in double.
sanitize: install-dev
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
		-DREPLKNET_SANITIZE=ON -DREPLKNET_CORE_DIR=$(CURDIR)/build/sanitize
	$(BIN)/cmake --build build/sanitize --target check_core
	build/sanitize/check_core 400

# The same checks of the NEON build. Needs Debian's g++-aarch64-linux-gnu and qemu-user-static.
test-aarch64: install-dev
	$(BIN)/cmake -S . -B build/aarch64 -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
		-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DREPLKNET_CORE_DIR=$(CURDIR)/build/aarch64
	$(BIN)/cmake --build build/aarch64 --target check_core
	qemu-aarch64-static -L /usr/aarch64-linux-gnu build/aarch64/check_core 400

wheel: install-dev
	$(BIN)/pip wheel --no-deps --wheel-dir dist .

bench: install-dev
	$(BIN)/replknet benchmark op

format:
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build dist .venv
