# Targets with a "##" comment are listed by `make help`.
.DEFAULT_GOAL := help
SHELL := /bin/bash
# Any Python that is new enough, by whatever name; `make PYTHON=...` takes another.
PYTHON ?= $(shell for name in python3 python python3.14 python3.13 python3.12 python3.11; do \
	if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$name; break; fi; done)
BIN := .venv/bin
RUNS := runs/quickstart
CONFIGS := lightning_configs/quickstart
LIT := $(BIN)/discrete-lit

.PHONY: help setup quickstart comparison trained test test-slow lint format types bench

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: .venv/installed ## make .venv and install the project with everything for its checks

.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer is on the path; name one by make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --editable '.[dev]'
	@touch $@

test: .venv/installed ## the fast tests, about 8 minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses logical --maxprocesses 8 -m "not slow and not slurm"

test-slow: .venv/installed ## the slow tests, and those of a SLURM cluster where there is one
	$(BIN)/pytest -m "slow or slurm"

lint: .venv/installed ## check format, style, and which module may import which
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache

format: .venv/installed ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: .venv/installed ## check types
	$(BIN)/pyright

bench: .venv/installed ## speed against bare loops and peers, as ratios; wants a quiet machine
	$(BIN)/pip install --quiet --editable '.[dev,bench]'
	for benchmark in benchmarks/*.py; do $(BIN)/python $$benchmark || exit 1; done

# The quickstart. Each step is a command that you can run yourself; what is finished is not done again, and a training
# that was interrupted goes on from its last checkpoint.
quickstart: $(RUNS)/evaluation/report.md ## train two generators on real images and compare them, about 15 minutes on 2 cores
	@echo
	@cat $(RUNS)/evaluation/report.md
	@echo
	@echo "pictures:     $(RUNS)/masked/grid.png $(RUNS)/autoregressive/grid.png"
	@echo "samples:      $(RUNS)/masked/samples.npz $(RUNS)/autoregressive/samples.npz"
	@echo "training log: $(BIN)/tensorboard --logdir $(RUNS)"

$(RUNS)/shards/train/manifest.json: | .venv/installed
	$(LIT) shards --config $(CONFIGS)/shards.yaml

$(RUNS)/shards/test/manifest.json: | .venv/installed
	$(LIT) shards --config $(CONFIGS)/shards_test.yaml

$(RUNS)/classifier/finished: $(RUNS)/shards/train/manifest.json $(RUNS)/shards/test/manifest.json
	$(LIT) fit --config $(CONFIGS)/classifier.yaml --ckpt_path last
	@touch $@

$(RUNS)/tokenizer/finished: $(RUNS)/shards/train/manifest.json $(RUNS)/shards/test/manifest.json
	$(LIT) fit --config $(CONFIGS)/tokenizer.yaml --ckpt_path last
	@touch $@

$(RUNS)/tokenizer_%/finished: $(RUNS)/shards/train/manifest.json $(RUNS)/shards/test/manifest.json
	$(LIT) fit --config $(CONFIGS)/tokenizer_$*.yaml --ckpt_path last
	@touch $@

define tokenize
rm -rf $(@D)
$(LIT) tokenize --config $(CONFIGS)/tokens.yaml --ckpt_path $(<D)/checkpoints/last.ckpt --split $(1) --output $(@D)
endef

$(RUNS)/tokens/train/manifest.json: $(RUNS)/tokenizer/finished
	$(call tokenize,train)

$(RUNS)/tokens/test/manifest.json: $(RUNS)/tokenizer/finished
	$(call tokenize,validation)

$(RUNS)/tokens_%/train/manifest.json: $(RUNS)/tokenizer_%/finished
	$(call tokenize,train)

$(RUNS)/tokens_%/test/manifest.json: $(RUNS)/tokenizer_%/finished
	$(call tokenize,validation)

$(RUNS)/%/finished: $(RUNS)/tokens/train/manifest.json $(RUNS)/tokens/test/manifest.json
	$(LIT) fit --config $(CONFIGS)/$*.yaml --ckpt_path last
	@touch $@

$(RUNS)/%/samples.npz: $(RUNS)/%/finished
	$(LIT) sample --config $(CONFIGS)/sample.yaml --ckpt_path $(<D)/checkpoints/last.ckpt --output $(@D)

$(RUNS)/evaluation/report.md: $(RUNS)/masked/samples.npz $(RUNS)/autoregressive/samples.npz $(RUNS)/classifier/finished
	$(LIT) evaluate --config $(CONFIGS)/evaluate.yaml

# The comparison goes on from the quickstart. While it trains, two commands share the processors, which keeps them busier
# than one does; it samples one by one, so that the speeds in the table are of the whole machine.
FAMILIES := next_scale bar maskbit masked autoregressive rar
SAMPLERS := halton titok random_order
HALF_OF_THE_PROCESSORS := $(shell echo $$((($$(getconf _NPROCESSORS_ONLN) + 1) / 2)))

comparison: ## train all families of generators on one backbone and compare them, 36 minutes on 2 cores
	$(MAKE) --jobs 2 trained OMP_NUM_THREADS=$(HALF_OF_THE_PROCESSORS)
	$(MAKE) $(RUNS)/comparison/report.md
	@echo
	@cat $(RUNS)/comparison/report.md

trained: $(RUNS)/classifier/finished $(FAMILIES:%=$(RUNS)/%/finished)

$(RUNS)/bar/finished $(RUNS)/maskbit/finished: $(RUNS)/tokens_lfq/train/manifest.json $(RUNS)/tokens_lfq/test/manifest.json

$(RUNS)/next_scale/finished: $(RUNS)/tokens_multi_scale/train/manifest.json $(RUNS)/tokens_multi_scale/test/manifest.json

$(RUNS)/masked_%/samples.npz: $(RUNS)/masked/finished
	$(LIT) sample --config $(CONFIGS)/sample_$*.yaml

$(RUNS)/comparison/report.md: $(FAMILIES:%=$(RUNS)/%/samples.npz) $(SAMPLERS:%=$(RUNS)/masked_%/samples.npz) $(RUNS)/classifier/finished
	$(LIT) evaluate --config $(CONFIGS)/comparison.yaml

# What a pattern makes is kept, also on the way to something else.
.PRECIOUS: $(RUNS)/%/finished $(RUNS)/tokenizer_%/finished $(RUNS)/%/samples.npz $(RUNS)/masked_%/samples.npz \
	$(RUNS)/tokens_%/train/manifest.json $(RUNS)/tokens_%/test/manifest.json
