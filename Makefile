# make demo   set up, and let the embedded model write with its experts read from disk
# make test   set up, and run every check and test
# make gpu-test   run the tests of everything that a GPU computes, on one
# make client-test   install the clients of docs/clients.md, and let each finish a task against the server
# The rest is what these two are made of.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := build/clients
PIP := $(BIN)/pip --disable-pip-version-check
SOURCES := $(shell find src native CMakeLists.txt pyproject.toml -type f -not -name '*.pyc')
CXX_FILES := $(shell find native -name '*.cpp' -o -name '*.h')
comma := ,
PYTHON_FILES := src tests training benchmarks docs

.PHONY: demo test unit-test lint format native-test neon-test fuzz clients client-test gpu-test docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/expertstream inspect
	@echo
	$(BIN)/expertstream run --memory 24MiB --context 1024 --seed 6 --max-tokens 200 --stats "Once upon a time"

test: lint native-test unit-test

unit-test: $(VENV)/test-tools $(VENV)/installed build/fixtures/fetched
	$(BIN)/python -m pytest tests

$(VENV)/created:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	touch $@

# The package as a user gets it: a wheel, installed; tests never see the source tree.
$(VENV)/installed: $(VENV)/created $(SOURCES)
	$(PIP) install --quiet .
	touch $@

$(VENV)/test-tools: $(VENV)/created tests/requirements.txt
	$(PIP) install --quiet --requirement tests/requirements.txt
	touch $@

# What tests need of others' source packages; those tests are skipped without.
build/fixtures/fetched: $(VENV)/created tests/fetch_fixtures.py
	$(BIN)/python tests/fetch_fixtures.py
	mkdir -p $(dir $@) && touch $@

lint: $(VENV)/test-tools $(VENV)/installed
	$(BIN)/ruff check $(PYTHON_FILES)
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/mypy src/expertstream
	$(BIN)/mypy --strict tests/test_public_api.py
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/test-tools
	$(BIN)/ruff check --fix $(PYTHON_FILES)
	$(BIN)/ruff format $(PYTHON_FILES)
	$(BIN)/clang-format -i $(CXX_FILES)

# A call of CMake for tests without Python, in the build folder $(1), with the options $(2); silent unless it fails.
cmake_tests = $(BIN)/cmake -S . -B build/$(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DEXPERTSTREAM_PYTHON=OFF \
	  -DEXPERTSTREAM_TESTS=ON -DEXPERTSTREAM_WERROR=ON $(2) > build-$(1).log 2>&1 || (cat build-$(1).log; exit 1); rm -f build-$(1).log

# The native tests under AddressSanitizer and UndefinedBehaviorSanitizer, warnings as errors; and no weak symbol in a kernel
# object: the linker would be free to keep the copy that was compiled for another machine. Threads under ThreadSanitizer, which some
# kernels' random addresses confuse: then it runs without them.
native-test: $(VENV)/test-tools
	$(call cmake_tests,sanitize,-DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="-O1 -g -fsanitize=address$(comma)undefined -fno-sanitize-recover=all")
	$(BIN)/cmake --build build/sanitize
	build/sanitize/test_native
	$(call cmake_tests,threads,-DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="-O1 -g -fsanitize=thread")
	$(BIN)/cmake --build build/threads --target test_threads
	build/threads/test_threads 2> build/threads/report || (grep -q "unexpected memory mapping" build/threads/report \
	  && setarch -R build/threads/test_threads) || (cat build/threads/report; exit 1)
	$(BIN)/python tests/check_symbols.py

# The same tests for 64-bit Arm, under emulation. Debian: g++-aarch64-linux-gnu qemu-user.
neon-test: $(VENV)/test-tools
	$(call cmake_tests,neon,-DCMAKE_BUILD_TYPE=Release -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static)
	$(BIN)/cmake --build build/neon
	qemu-aarch64 build/neon/test_native

# Everything that is read from strangers, fuzzed for so many seconds. Atheris has no wheel for some machines and newest Pythons.
FUZZ_SECONDS ?= 60
fuzz: $(VENV)/test-tools $(VENV)/installed
	@mkdir -p build/fuzz
	@if $(BIN)/python -c "import atheris" 2> /dev/null; then \
	  $(BIN)/python tests/fuzz.py -max_total_time=$(FUZZ_SECONDS) -max_len=8192 -timeout=20 -rss_limit_mb=4096 -artifact_prefix=build/fuzz/ \
	    > build/fuzz/log 2>&1 && tail -1 build/fuzz/log || (tail -40 build/fuzz/log; exit 1); \
	else echo "atheris is not installed here: nothing is fuzzed"; fi

# Other people's programs against the server, as docs/clients.md says. They live apart: none is imported by a test.
client-test: $(VENV)/test-tools $(VENV)/installed clients
	$(BIN)/python -m pytest tests/clients

clients: $(CLIENTS)/node/stamp $(CLIENTS)/python/stamp $(CLIENTS)/aider/stamp

# Without npm its clients are not tested, and the next `make` looks again.
$(CLIENTS)/node/stamp: tests/clients/package.json
	@command -v npm > /dev/null || echo "npm is not installed: the tests of Claude Code, Codex and opencode are skipped"
	@mkdir -p $(@D) && cp $< $(@D)/package.json
	command -v npm > /dev/null || exit 0; npm install --prefix $(@D) --no-audit --no-fund --no-package-lock --loglevel error && touch $@

$(CLIENTS)/python/stamp: tests/clients/requirements.txt
$(CLIENTS)/aider/stamp: tests/clients/requirements-aider.txt
$(CLIENTS)/python/stamp $(CLIENTS)/aider/stamp:
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip --disable-pip-version-check install --quiet --only-binary=:all: --no-compile --requirement $<
	touch $@

# On a machine with a GPU: the tests of its ops, models, states and faults on the card instead of in the emulator.
gpu-test: $(VENV)/test-tools $(VENV)/installed
	EXPERTSTREAM_GPU_TESTS=1 $(BIN)/python -m pytest tests/cuda

docs: $(VENV)/installed
	$(BIN)/python docs/generate_cli.py > docs/cli.md
	$(BIN)/python docs/generate_fields.py

clean:
	rm -rf build $(VENV)
