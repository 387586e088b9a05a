# Everything a developer runs. `make` alone lists it; each target sets up first what it needs.

venv := .venv/bin
c_files = $(shell find firmware tests -name '*.[ch]')

# How long `make fuzz` looks for new inputs, for each target.
FUZZ_SECONDS ?= 60

.PHONY: help setup demo test fuzz bench-kernels check lint types format clean

help: ## list these targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

setup: ## install what is missing: Debian's packages, .venv with Python's
	@toolkit/setup.sh

demo: setup ## train one network across several devices, all of them on this machine
	@$(venv)/splitee train examples/demo.toml

test: setup ## run the tests, on every core
	@$(venv)/pytest -n auto --dist loadfile --no-loadscope-reorder

fuzz: setup ## look for bytes that break the firmware's decoder or device, FUZZ_SECONDS each
	@FUZZ_SECONDS=$(FUZZ_SECONDS) $(venv)/pytest --hypothesis-profile=fuzz --timeout=0 -rsP \
	    tests/firmware/test_fuzz.py tests/firmware/test_verdicts.py

bench-kernels: setup ## count what each kernel costs on the emulated boards
	@$(venv)/splitee bench kernels --board qemu-m4
	@$(venv)/splitee bench kernels --board qemu-m55
	@$(venv)/splitee bench kernels --board qemu-m4 --int8
	@$(venv)/splitee bench kernels --board qemu-m55 --int8

check: lint types test ## everything that continuous integration checks

lint: setup ## check form, likely bugs and who imports whom
	$(venv)/ruff format --check .
	$(venv)/ruff check .
	clang-format --dry-run -Werror $(c_files)
	$(venv)/lint-imports --no-logo --cache-dir build/cache/imports

types: setup ## check the types
	$(venv)/mypy

format: setup ## bring Python and C into form
	$(venv)/ruff check --fix-only .
	$(venv)/ruff format .
	clang-format -i $(c_files)

clean: ## remove what was built, and caches; keeps .venv and runs/
	rm -rf build .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
