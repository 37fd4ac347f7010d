# The front door. `make help` lists what there is.
#
# PYTHON names an existing environment to use as it is; without it, .venv is created and filled.
# ARGS is passed through: make test ARGS="-k forward", make build ARGS="--archs all".

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
ARGS ?=

ifdef PYTHON
  ENVIRONMENT :=
else
  PYTHON := .venv/bin/python
  ENVIRONMENT := .venv/.installed
endif

# Two processes run the tests, a thread each: with two each they would wait for one another on two
# cores, for half of the time. On a GPU it is one process, which may take all of its memory.
PYTEST = $(shell nvidia-smi >/dev/null 2>&1 || printf %s 'OMP_NUM_THREADS=1') $(PYTHON) -m pytest \
  $(shell nvidia-smi >/dev/null 2>&1 || printf %s '-n 2 --dist worksteal') \
  tests tools/tests benchmarks/tests

# Less registration.h, which kernel-builder generates in torch-ext.
NATIVE = $(shell find deformable_detr torch-ext benchmarks tools \
  -name registration.h -o -name '*.h' -print -o -name '*.cpp' -print -o -name '*.cu' -print -o -name '*.cuh' -print)

# The tests and benchmarks load this checkout where users load the Hub's repository.
export LOCAL_KERNELS := $(shell sed -n 's/^repo-id = "\(.*\)"/\1/p' build.toml)=$(CURDIR)

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: bench
bench: build ## compare with the eager implementations on this machine
	$(PYTHON) -m benchmarks $(ARGS)

# In units of grid_sample's time in the same run, on one thread: whatever the machine and its load.
.PHONY: guard
guard: build ## fail if the CPU kernel has become much slower beside grid_sample
	rm -f .ninja/guard.jsonl
	OMP_NUM_THREADS=1 $(PYTHON) -m benchmarks --device cpu --workloads seed_b2_q300 ddetr_decoder_b4 \
	  --impls grid_sample deformable_detr --passes forward backward --reps 15 --out .ninja/guard.jsonl
	$(PYTHON) -m benchmarks compare benchmarks/results/guard-cpu.jsonl .ninja/guard.jsonl \
	  --impls deformable_detr --relative-to grid_sample --threshold 2.5

.PHONY: test
test: build ## run the tests, less those marked slow
	$(PYTEST) -m "not slow" $(ARGS)

.PHONY: test-all
test-all: build ## run all tests
	$(PYTEST) $(ARGS)

.PHONY: fuzz
fuzz: build ## compare 20,000 random problems with float64
	$(PYTHON) tests/fuzz.py $(ARGS)

.PHONY: build
build: $(ENVIRONMENT) ## build this machine's variants into build/
	$(PYTHON) tools/build.py $(if $(filter build,$(MAKECMDGOALS)),$(ARGS))

.PHONY: lint
lint: $(ENVIRONMENT) ## check the style of Python and native code, and the package's types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy torch-ext/deformable_detr
	$(PYTHON) -c 'import clang_format as c; c.clang_format()' --dry-run -Werror $(NATIVE)

.PHONY: release
release: $(ENVIRONMENT) ## build every variant of the last commit, twice, into release/
	$(PYTHON) tools/release.py $(ARGS)

.PHONY: publish
publish: $(ENVIRONMENT) ## upload release/ to the Hub; ARGS=--dry-run only shows what would change
	$(PYTHON) tools/publish.py $(ARGS)

.PHONY: clean
clean: ## remove what was built; .venv stays
	rm -rf build .ninja release .toolkits

# A machine with a GPU and no nvcc gets nvcc from pip.
.venv/.installed: requirements.txt requirements-cuda.txt
	python3 tools/build.py --check
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/python -m pip install -r requirements.txt
	if nvidia-smi >/dev/null 2>&1 && ! .venv/bin/python tools/build.py --check --backend cuda; then \
	  .venv/bin/python -m pip install -r requirements-cuda.txt; fi
	touch $@
