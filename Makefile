# `make demo` and `make test` do all set-up first: they need Python 3.11, 3.12 or 3.13 (PYTHON=<path> chooses one), git and make.
# A second run finds the stamps in .venv/.stamps and starts at once.

SHELL := bash
PY := .venv/bin/python
STAMPS := .venv/.stamps
FOLDERS := backend cli llm ops partitioner runtime wgsl
MYPY_TREE := build/mypy/executorch_webgpu
PYTEST_ARGS ?=
export PYTHON

# Vulkan's window system code complains on stderr where this is unset.
ifndef XDG_RUNTIME_DIR
export XDG_RUNTIME_DIR := $(shell mkdir -p -m 700 "$(CURDIR)/build/xdg" && echo "$(CURDIR)/build/xdg")
endif

.PHONY: demo test pytest tint swiftshader lint types setup clean help
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

demo: $(STAMPS)/vulkan ## set up and run the example: a small language model on this machine's GPU (or CPU driver)
	$(PY) -m examples.stories.demo

test: pytest ## set up, run all tests, then compile every recorded shader variant with Tint where that can be installed
	$(PY) -m tests.wgsl.tint --if-possible

pytest: $(STAMPS)/vulkan
	rm -rf build/variants
	$(PY) -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

tint: $(STAMPS)/vulkan ## compile every recorded shader variant with Tint (Dawn)
	$(PY) -m tests.wgsl.tint

# A second driver, with few invocations, little workgroup memory, subgroups of four and no f16. Debian's chromium package brings it.
SWIFTSHADER ?= /usr/lib/chromium/vk_swiftshader_icd.json

swiftshader: $(STAMPS)/packages ## attention, products, batches, sessions, captured steps and token choice on SwiftShader (SWIFTSHADER=<its ICD file>)
	@test -e "$(SWIFTSHADER)" || { echo "no SwiftShader at $(SWIFTSHADER): install chromium, or set SWIFTSHADER"; exit 1; }
	VK_DRIVER_FILES="$(SWIFTSHADER)" VK_ICD_FILENAMES="$(SWIFTSHADER)" $(PY) -m pytest -n 2 --dist loadfile tests/ops/test_attention*.py \
	  tests/ops/test_ragged*.py tests/ops/test_rope*.py tests/ops/test_gemm.py tests/ops/test_project*.py tests/llm/test_packed_caches.py tests/llm/test_group_query_delegate.py \
	  tests/runtime/test_replay.py tests/runtime/test_chooser*.py tests/runtime/test_generate.py tests/runtime/test_batch*.py \
	  tests/runtime/test_rewind*.py tests/runtime/test_session.py tests/runtime/test_speculative.py $(PYTEST_ARGS)

lint: $(STAMPS)/packages ## ruff
	$(PY) -m ruff check .

# The import package is made of top-level folders; mypy gets a tree of links in which they have their names.
types: $(STAMPS)/packages ## mypy --strict on the packages and the benchmarks
	@rm -rf $(MYPY_TREE) && mkdir -p $(MYPY_TREE)
	@for folder in $(FOLDERS); do ln -s ../../../$$folder $(MYPY_TREE)/$$folder; done
	MYPYPATH=build/mypy $(PY) -m mypy -p executorch_webgpu -p benchmarks

setup: $(STAMPS)/vulkan ## only set up

$(STAMPS)/venv:
	scripts/setup.sh venv
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	scripts/setup.sh torch
	@touch $@

$(STAMPS)/packages: $(STAMPS)/torch constraints.txt pyproject.toml setup.py
	scripts/setup.sh packages
	@touch $@

$(STAMPS)/vulkan: $(STAMPS)/packages
	scripts/setup.sh vulkan
	@touch $@

clean: ## remove .venv and everything built
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
