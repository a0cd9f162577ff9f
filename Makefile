# Everything on a fresh machine: `make demo` runs the main job, `make test` the tests. Both first make a
# virtual environment and build the extension in it.
#   make demo TORCH='torch==2.14.1'     with another torch (default: the one that CI tests with)
#   make demo PYTHON=python3.12         with another Python
#   make demo VENV=/path                with the environment elsewhere
#   make bench BENCH=--quick            with options of `python -m benchmarks.report`
#   make models MODELS='--only siren'   programs converted, in a TrainStep, captured, frozen: what is taken, how fast it is
#   make docs                           the site with tutorial, guides and reference, into out/docs
#   make account                        where the time of a training step goes
#   make attack                         20,000 random programs against PyTorch; `make test` runs two minutes of them
#   make attack ATTACK='--surface frozen --seed 7'  one of them again, as a failure names it
#   make gpu-proof                      what can be proved of the CUDA kernels without a GPU (docs/gpu.md); about an hour
#   make gpu-test TORCH='torch==2.14.1'  on a machine with a GPU and a CUDA toolkit: its tests and benchmark
#   make gpu-proof PROOF='--only read'  one gate of it
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
JOBS ?= $(shell nproc)

# Recipes fail where a part of a pipe does.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

# Tools of the environment, ninja among them, are found first.
export PATH := $(abspath $(VENV))/bin:$(PATH)
export MAX_JOBS ?= $(JOBS)

SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test tested checked build lint pytest beside other-isas sanitize sanitized-sources attack bench account models docs gpu-proof gpu-proof-quick gpu-test tiles product-account format clean
.DELETE_ON_ERROR:

demo: build
	python -m fastmlp demo

# Lint, types, all tests, the kernels once more on the other instruction sets and under sanitizers, and the quick part of
# what is proved of the CUDA kernels. The tests run beside all else, because most of them use one core; those of kernels
# and frozen networks are among the rest, so that both parts take about as long. The output of the tests is
# seen as it comes, that of the rest when it ends: out/checks.log. pytest's closing line is the last.
BESIDE := tests/kernels tests/cuda tests/frozen
CHECKS := lint docs sanitize other-isas beside gpu-proof-quick
# In tests OpenMP's threads sleep while they wait, because on a busy core one that spins keeps others from what it waits
# for: of a test on two such cores that took 44 s, 2 s remained.
test pytest beside other-isas sanitize attack: export OMP_WAIT_POLICY = passive
test: build $(VENV)/models $(VENV)/docs $(VENV)/gpu-proof
	$(MAKE) --no-print-directory --jobs=2 tested checked
	cat out/checks.log
	tail -n 1 out/pytest.log

tested:
	mkdir -p out
	python -m pytest $(addprefix --ignore=,$(BESIDE)) 2>&1 | tee out/pytest.log

checked:
	mkdir -p out && $(MAKE) --jobs=1 $(CHECKS) >out/checks.log 2>&1 || { cat out/checks.log; exit 1; }

build: $(VENV)/built

# One for each torch: another one is installed in its place.
INSTALLED = $(VENV)/installed-$(subst =,,$(TORCH))
$(INSTALLED): pyproject.toml Makefile
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --upgrade pip
	python -m pip install --quiet '$(TORCH)'
	python -m pip install --quiet 'setuptools>=77' ninja numpy
	rm -f $(VENV)/installed*
	touch $@

# The extension is built in place, so that tests and tools see the checkout.
$(VENV)/built: $(INSTALLED) $(SOURCES)
	python -m pip install --quiet --no-build-isolation --editable '.[demo,test,dev]'
	touch $@

CXX_FILES := find csrc tools tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cuh' -o -name '*.cu'

lint: build $(VENV)/docs
	ruff check .
	ruff format --check .
	$(CXX_FILES) | xargs clang-format --dry-run --Werror
	mypy

# The extra gpu-proof brings the nvcc of tests/cuda/test_cuda_ptx.py.
pytest: $(VENV)/models $(VENV)/gpu-proof
	python -m pytest

beside: $(VENV)/gpu-proof
	python -m pytest -q -p no:cacheprovider $(BESIDE)

# On a processor without one of them the list that the tests enumerate is shorter.
KERNEL_TESTS := tests/kernels/test_kernels.py tests/kernels/test_math.py tests/modules/test_autograd.py
other-isas: build
	FASTMLP_ISA=portable FASTMLP_TEST_ISAS=portable python -m pytest -q -p no:cacheprovider $(KERNEL_TESTS)
	if python -c "import fastmlp; fastmlp.set_isa('avx2')"; then \
	  FASTMLP_ISA=avx2 FASTMLP_TEST_ISAS=avx2 python -m pytest -q -p no:cacheprovider $(KERNEL_TESTS); fi

# A second build of the package with ASan and UBSan, in a folder of its own. Python itself is not
# instrumented, so the runtime is preloaded and leaks are not looked for.
SANITIZED := build/sanitized
SANITIZED_TESTS := $(addprefix tests/,kernels/test_kernels.py modules/test_errors.py training/test_optim.py \
  training/test_train_step_losses.py frozen/test_frozen.py)
SANITIZED_PYTHON = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 PYTHONPATH=. python
sanitize: sanitized-sources
	cd $(SANITIZED) && FASTMLP_SANITIZE=address,undefined python setup.py -q build_ext --inplace
	cd $(SANITIZED) && $(SANITIZED_PYTHON) -m pytest -q -p no:cacheprovider $(SANITIZED_TESTS)
	cd $(SANITIZED) && $(SANITIZED_PYTHON) -m tests.attack --seconds 60

# Objects stay, so that only what has changed is compiled again. Caches of Python are left out, because tests that run
# meanwhile write them.
sanitized-sources: build
	mkdir -p $(SANITIZED)
	cd $(SANITIZED) && rm -rf csrc fastmlp tests
	cp -p --parents setup.py pyproject.toml README.md LICENSE \
	  $$(find csrc fastmlp tests -name __pycache__ -prune -o -type f -not -name '_C*.so' -print) $(SANITIZED)

# The generated attack: what it is, tests/attack/__init__.py says. Fresh memory is filled with a byte that makes floats huge.
attack: build
	MALLOC_PERTURB_=1 python -m tests.attack $(ATTACK)

# An extra's packages without the package itself, which would be built once more. With torch named, pip takes those
# that go with it, and does not replace it.
EXTRA := import sys, tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
  print(*project["optional-dependencies"][sys.argv[1]])
$(VENV)/bench $(VENV)/models $(VENV)/docs $(VENV)/gpu-proof: $(VENV)/built
	python -m pip install --quiet '$(TORCH)' $$(python -c '$(EXTRA)' $(@F))
	touch $@

# The site, into out/docs. A warning is an error: a link or an anchor that leads nowhere, a page that is not listed.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict --quiet

bench: $(VENV)/bench
	python -m benchmarks.report $(BENCH)

account: $(VENV)/bench
	python -m benchmarks.account $(ACCOUNT)

models: $(VENV)/models
	python -m benchmarks.models $(MODELS)

gpu-proof: $(VENV)/gpu-proof
	python -m tools.gpu_proof $(PROOF)

gpu-proof-quick: $(VENV)/gpu-proof
	python -m tools.gpu_proof --quick

# The benchmark, then the tests that need a GPU; both can be sent as they are printed, and out/gpu.json.
gpu-test: export FASTMLP_CUDA = 1
gpu-test: build
	python -c "import sys; from fastmlp import _C; why = _C.device_obstacle('cuda'); sys.exit(why and 'make gpu-test: ' + why)"
	python -m fastmlp info
	python -m fastmlp bench --device cuda --output out/gpu.json
	python -m pytest tests/cuda/test_gpu_kernels.py tests/cuda/test_cuda.py tests/cuda/test_cuda_capture.py

# The measurements behind the cache blocks of csrc/cpu/tiles.h: make tiles TILES='avx2 float64'
build/tune_tiles build/account_products: build/%: tools/%.cpp $(SOURCES)
	mkdir -p build
	$(CXX) -std=c++20 -O3 -fopenmp -Wno-psabi -o $@ $< csrc/contract/activation_info.cpp \
	  $(addprefix csrc/cpu/,gemm.cpp dispatch.cpp workspace.cpp) csrc/cpu/isa/*.cpp

tiles: build/tune_tiles
	build/tune_tiles $(TILES)

# Where the time of square products goes: make product-account TILES=avx2
product-account: build/account_products
	build/account_products $(TILES)

format: build
	ruff check --fix .
	ruff format .
	$(CXX_FILES) | xargs clang-format -i

clean:
	rm -rf $(VENV) build out *.egg-info fastmlp/_C*.so fastmlp/_build.json
