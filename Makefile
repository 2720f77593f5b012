# One command is enough on a bare machine: every target first brings the virtual environment up to date.

SHELL       := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
NP     ?= 2
RATE   ?= 1gbit
HOSTS  ?= 2
DELAY  ?=
JOBS   ?= 1

STRIKES     ?= 312
INJECTIONS  ?= 2000
WRONG_CALLS ?= 10000
SOAK        ?= 20000

VENV     := .venv
PEER_VENV := out/peers
DEEPSPEED := $(PEER_VENV)/.deepspeed
BIN      := $(VENV)/bin
PACKAGES := compress comm optim benchmarks

# A strict editable install links each file of the packages by name. The stamp's name therefore carries a checksum of the
# list of these names: a new, moved or deleted file makes a stamp that is not there yet, and the links are made again.
INSTALLED := $(VENV)/.installed-$(shell find $(PACKAGES) -type f \
	\( -name '*.py' -o -name '*.cu' -o -name '*.cuh' -o -name py.typed \) \
	2>/dev/null | LC_ALL=C sort | cksum | cut -d' ' -f1)
REQUIREMENTS := $(VENV)/.requirements

# mypy names the links; a reader wants the files that they point to.
SOURCE_PATHS := sed -E 's|^build/__editable__[^/]*/onebit/||'

.PHONY: help
help: ## print this list
	@echo 'usage: make TARGET'
	@echo
	@sed -En 's/^([a-z-]+):.*## (.*)/  \1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r target text; do \
		printf '%-17s %s\n' "$$target" "$$text"; done
	@echo
	@echo 'variables, as in make test-mpi NP=4:'
	@echo '  PYTHON=$(PYTHON) (3.10 or newer, read when $(VENV) is made)  JOBS=$(JOBS) (for test: files at a time)'
	@echo '  NP=$(NP)  RATE=$(RATE)  HOSTS=$(HOSTS)  LOCAL=$(LOCAL)  DELAY=$(DELAY)  BACKEND=$(BACKEND)  SHORT=$(SHORT)  SOCKETS=$(SOCKETS)  PEERS=$(PEERS)'
	@echo '  STRIKES=$(STRIKES)  INJECTIONS=$(INJECTIONS)  WRONG_CALLS=$(WRONG_CALLS)  SOAK=$(SOAK)'

.PHONY: setup
setup: $(INSTALLED) ## build .venv with the versions of constraints.txt; needs the network the first time only

.PHONY: demo
demo: setup ## train a small transformer on two ranks, AdamW against OnebitAdam; prints a table and a plot's path
	$(BIN)/python examples/demo.py

.PHONY: test
test: setup ## run all tests that this machine can run, JOBS files at a time
	$(BIN)/python -m pytest $(if $(filter-out 1,$(JOBS)),-n $(JOBS) --dist loadfile --no-loadscope-reorder)

.PHONY: test-mpi
test-mpi: setup ## run the tests over MPI with NP ranks
	ONEBIT_TEST_NP=$(NP) $(BIN)/python -m pytest -m mpi

.PHONY: torture
torture: setup ## strike at ranks, spoil gradients, make wrong calls and SOAK steps; minutes on many cores
	$(BIN)/python -m tests.faults.campaign --strikes $(STRIKES) --injections $(INJECTIONS) \
		--wrong-calls $(WRONG_CALLS) --soak $(SOAK) --output benchmarks/results
	$(MAKE) bench-report

.PHONY: lint
lint: setup ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PACKAGES:%=-p onebit.%) | $(SOURCE_PATHS)

.PHONY: format
format: setup ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

.PHONY: bench
bench: setup ## time kernels and collectives on this machine and check their results; minutes
	$(BIN)/python -m onebit.benchmarks.suite --plot

RESULTS  := --output benchmarks/results --plot
AVERAGES := --cases collectives,modes,stages $(RESULTS)
TORCHRUN := $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node $(NP)

.PHONY: bench-gloo
bench-gloo: setup ## averages and their stages on NP ranks of this machine, over Gloo
	GLOO_SOCKET_IFNAME=lo $(TORCHRUN) -m onebit.benchmarks --backend gloo -b 64K -e 64M -f 32 --link loopback $(AVERAGES)

.PHONY: bench-mpi
bench-mpi: setup ## the same over MPI
	$(BIN)/mpiexec --allow-run-as-root --oversubscribe --bind-to none -n $(NP) \
		$(BIN)/python -m onebit.benchmarks --backend mpi -b 64K -e 64M -f 32 --link 'shared memory' $(AVERAGES)

.PHONY: bench-nccl
bench-nccl: setup ## the same over NCCL, on NP GPUs
	$(TORCHRUN) -m onebit.benchmarks --backend nccl -b 4M -e 1G -f 8 --name nccl-$(NP)-sweep $(AVERAGES)

.PHONY: bench-net
bench-net: setup ## averages between HOSTS namespaces of LOCAL ranks, links of RATE and DELAY; BACKEND=nccl: on GPUs; needs root
	$(BIN)/python -m onebit.benchmarks.net --rate $(RATE) --hosts $(HOSTS) $(if $(LOCAL),--local $(LOCAL)) \
		$(if $(BACKEND),--backend $(BACKEND)) $(if $(MAXBYTES),-e $(MAXBYTES)) \
		$(if $(DELAY),--delay $(DELAY)) $(if $(CASES),--cases $(CASES)) --plot

.PHONY: bench-train
bench-train: setup ## train a transformer by AdamW and by 1-bit optimizers, HOSTS namespaces, links of RATE; SHORT=6: time steps only
	$(BIN)/python -m onebit.benchmarks.train --rate $(RATE) --hosts $(HOSTS) --plot \
		$(if $(STEPS),--steps $(STEPS)) $(if $(EXACT),--exact $(EXACT)) $(if $(SHORT),--short $(SHORT))

# SOCKETS=1: what hosts on an Ethernet have, TCP in place of the GPUs' own links.
SOCKETS_ONLY := NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 NCCL_NET=Socket

.PHONY: bench-train-gpu
bench-train-gpu: setup ## on NP GPUs, a GPT of 124 M parameters: averages of 124 Mi numbers, and steps; SOCKETS=1: over TCP
	$(if $(SOCKETS),$(SOCKETS_ONLY)) $(TORCHRUN) -m onebit.benchmarks --backend nccl --cases collectives \
		-b 496M -e 496M --name nccl-$(NP)-124Mi$(if $(SOCKETS),-sockets) \
		--link '$(if $(SOCKETS),TCP sockets,own links)' --output benchmarks/results
	$(if $(SOCKETS),$(SOCKETS_ONLY)) $(TORCHRUN) -m onebit.benchmarks.overlap --batch 4

.PHONY: bench-scaling
bench-scaling: setup ## fit the scale model to the JSON results; write the tables and plots of docs/scaling.md
	$(BIN)/python -m onebit.benchmarks.scaling

.PHONY: bench-report
bench-report: bench-scaling ## write all tables and plots that the docs make from the JSON results
	$(BIN)/python -m onebit.benchmarks.report
	$(BIN)/python -m tests.faults.report

.PHONY: bench-adam
bench-adam: setup $(if $(PEERS),$(DEEPSPEED)) ## time CPUAdam against torch's optimizers, and with PEERS=1 against DeepSpeed's; minutes
	$(if $(PEERS),PATH="$(CURDIR)/$(PEER_VENV)/bin:$$PATH" $(PEER_VENV)/bin/python,$(BIN)/python) \
		-m onebit.benchmarks.adam_suite $(if $(PEERS),--peers)

# DeepSpeed's last release from PyPI, in an environment of its own that sees the packages of $(VENV); it builds its kernel
# with g++ and ninja when it is first used.
$(DEEPSPEED):
	$(BIN)/python -m venv $(PEER_VENV)
	$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
		> "$$($(PEER_VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])')/onebit.pth"
	$(PEER_VENV)/bin/python -m pip install --disable-pip-version-check --quiet --no-build-isolation deepspeed ninja
	touch $@

.PHONY: docs
docs: setup ## build the documentation's site in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.PHONY: wheel
wheel: setup ## build dist/onebit-*.whl
	rm -rf build/lib build/bdist.*
	$(BIN)/python -m build --no-isolation --wheel

.PHONY: dist
dist: setup ## build the source distribution and, from it, the wheel
	$(BIN)/python -m build --no-isolation

.PHONY: clean
clean: ## delete everything that these targets have made, .venv too
	rm -rf $(VENV) build dist out site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(PACKAGES) tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-compile

# pip would write the byte code of everything it installs. Using what the project uses writes the part that matters in half
# the time, once, where otherwise each rank of the first run would do it.
USED := import hypothesis, matplotlib.pyplot, numba, pytest, pytorch_lightning, rich.progress, torch._dynamo, \
	torch.distributed, tqdm, transformers.trainer; numba.njit(lambda: 0)()

$(REQUIREMENTS): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
		"onebit needs Python 3.10 or newer: make clean, then make setup PYTHON=python3.x")'
	@echo 'setting up $(VENV), one or two minutes:'
	@{ $(PIP_INSTALL) -c constraints.txt setuptools && \
	   $(PIP_INSTALL) -c constraints.txt --no-build-isolation --config-settings editable_mode=strict \
		-e '.[mpi,bench,docs,clients,dev]'; \
	} 2>&1 | tee $(VENV)/setup.log | while read -r verb name _; do case $$verb in \
		Collecting|Processing) name=$${name##*/}; name=$${name%%-[0-9]*}; printf ' %s' "$${name%%[=<>~;]*}" ;; \
		Installing) printf '\n unpacking\n' ;; esac; done \
		|| { echo; tail -n 30 $(VENV)/setup.log >&2; exit 1; }
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c '$(USED)'
	@rm -f $(VENV)/.installed-* && touch $@ $(INSTALLED)

$(INSTALLED): $(REQUIREMENTS)
	@test -e $@ || $(PIP_INSTALL) --quiet --no-index --no-deps --no-build-isolation \
		--config-settings editable_mode=strict -e .
	@rm -f $(VENV)/.installed-* && touch $@
