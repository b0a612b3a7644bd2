# Targets with a "##" comment are listed by `make help`.
.DEFAULT_GOAL := help
SHELL := /bin/bash
# Any Python that is new enough, by whatever name; `make PYTHON=...` takes another.
PYTHON ?= $(shell for name in python3 python python3.14 python3.13 python3.12 python3.11; do \
	if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$name; break; fi; done)
BIN := .venv/bin
RUNS := runs/quickstart
CONFIGS := lightning_configs/quickstart
COLOUR := runs/quickstart_colour
COLOUR_CONFIGS := lightning_configs/quickstart_colour
DIGITS := runs/quickstart_digits
DIGITS_CONFIGS := lightning_configs/quickstart_digits
AUDIO := runs/quickstart_audio
AUDIO_CONFIGS := lightning_configs/quickstart_audio
LIT := $(BIN)/discrete-lit
# What training sees; the table's images are those of the split `test`.
SHARDS := train validation
CLASSIFIERS := $(RUNS)/classifier/finished $(RUNS)/classifier_apart/finished
SEEDED := masked autoregressive
BFLOAT16 := $(shell grep -om1 'avx512_bf16\|amx_bf16' /proc/cpuinfo 2>/dev/null)
HALF_OF_THE_PROCESSORS := $(shell echo $$((($$(getconf _NPROCESSORS_ONLN) + 1) / 2)))

.PHONY: help setup quickstart learned quickstart-seeds quickstart-select quickstart-colour learned-colour colour-further learned-colour-further colour-hybrids learned-colour-hybrids quickstart-digits learned-digits digits-settings quickstart-emoji quickstart-audio learned-audio quickstart-video learned-video seeded comparison comparison-samplers comparison-further drawn drawn-otherwise drawn-further test test-slow bad-input kills wheels lint format types bench docs gpu gpu-wheels gpu-pack

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-19s %s\n", $$1, $$2}'

setup: .venv/installed ## make .venv and install the project with everything for its checks

.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer is on the path; name one by make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --editable '.[dev]'
	@touch $@

test: .venv/installed ## the fast tests, about 15 minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses logical --maxprocesses 8 -m "not slow and not slurm"

test-slow: .venv/installed ## the slow tests, and those of a SLURM cluster where there is one
	$(BIN)/pytest -m "slow or slurm"

bad-input: .venv/installed ## craft broken and hostile input of every kind, and judge what becomes of each; ARGS="part of a name"
	PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(BIN)/python -m bad_input.run $(ARGS)

kills: .venv/installed ## kill trainings at random points, resume them on other numbers of ranks, and compare every batch; ARGS="--kills 30 --seed 0"
	PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(BIN)/python -m kills.run $(ARGS)

wheels: .venv/installed ## build the wheel and use it in fresh environments on each Python at hand, with and without extras; ARGS="3.12"
	PYTHONPATH=tests $(BIN)/python -m wheels.run $(ARGS)

lint: .venv/installed ## check format, style, and which module may import which
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache

format: .venv/installed ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: .venv/installed ## check types
	$(BIN)/pyright

docs: .venv/installed ## the documentation as a site, build/site/index.html; fails where a link leads nowhere
	$(BIN)/mkdocs build --strict --quiet --config-file docs/site/mkdocs.yml

bench: .venv/installed ## speed against bare loops and peers, as ratios; wants a quiet machine
	$(BIN)/pip install --quiet --editable '.[dev,bench]'
	for benchmark in $(filter-out benchmarks/gpu%,$(wildcard benchmarks/*.py)); do $(BIN)/python $$benchmark || exit 1; done

# What follows is for a GPU; docs/gpu.md explains it. ARGS are those of benchmarks/gpu.py.
gpu: ## check on a GPU that the results are right, then measure how fast they come, 8 minutes; ARGS="--device cpu --tiny"
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) benchmarks/gpu.py $(ARGS)

# Small packages that a machine with torch, lightning and timm may lack, with what they need themselves.
GPU_WHEELS := jsonargparse docstring-parser typeshed-client webdataset braceexpand torch-fidelity \
	x-transformers vector-quantize-pytorch torch-einops-utils einx frozendict loguru
GPU_PLATFORMS := manylinux_2_28_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64

gpu-wheels: ## download the packages that a bare GPU machine lacks, for GPU_PYTHON (3.12), to gpu_wheels/
	rm -rf gpu_wheels
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) -m pip download --quiet --no-deps --only-binary=:all: \
		--implementation cp --python-version $(or $(GPU_PYTHON),3.12) $(GPU_PLATFORMS:%=--platform %) \
		--dest gpu_wheels $(GPU_WHEELS)
	@du -sh gpu_wheels

gpu-pack: ## pack what a bare GPU machine needs into gpu.tar; GOLDEN=folder adds the reference outputs
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) benchmarks/gpu_pack.py $(if $(GOLDEN),--golden $(GOLDEN))

# Say where the results $(2) are, which are called $(1), and the training logs, which are in $(3).
define pointed_out
@echo
@echo "$(1)$(2)"
@echo "training log: $(BIN)/tensorboard --logdir $(3)"
endef

# The quickstart. Each step is a command that you can run yourself; what is finished is not done again, and a training
# that was interrupted goes on from its last checkpoint.
# While it trains, two commands share the processors, which keeps them busier than one does; it samples one by one, so that
# the speeds in the table are of the whole machine.
# In float32 a tokenizer takes so long that one processor would wait for the other: there it trains first, on both.
quickstart: $(if $(BFLOAT16),,$(RUNS)/tokenizer/finished) ## train two generators on real images and compare them, 12 minutes on 2 cores
	$(MAKE) --jobs 2 learned OMP_NUM_THREADS=$(HALF_OF_THE_PROCESSORS)
	$(MAKE) $(RUNS)/evaluation/report.md
	$(MAKE) $(RUNS)/watch.html
	@echo
	@cat $(RUNS)/evaluation/report.md
	@echo
	@echo "pictures:     $(RUNS)/masked/grid.png $(RUNS)/autoregressive/grid.png"
	@echo "step by step: $(RUNS)/watch.html (open it in a browser)"
	@echo "samples:      $(RUNS)/masked/samples.npz $(RUNS)/autoregressive/samples.npz"
	@echo "training log: $(BIN)/tensorboard --logdir $(RUNS)"

learned: $(SEEDED:%=$(RUNS)/%/finished) $(CLASSIFIERS)

$(RUNS)/evaluation/report.md: $(RUNS)/masked/samples.npz $(RUNS)/autoregressive/samples.npz \
		$(RUNS)/shards/test/manifest.json $(CLASSIFIERS)
	$(LIT) evaluate --config $(CONFIGS)/evaluate.yaml

$(RUNS)/watch.html: $(SEEDED:%=$(RUNS)/%/finished)
	$(LIT) watch --config $(CONFIGS)/watch.yaml

# The quickstart is seed 0. The others share its shards and classifiers.
SEEDS := 1 2
OF_SEEDS := $(foreach seed,$(SEEDS),$(SEEDED:%=$(RUNS)/seed_$(seed)/%))

quickstart-seeds: ## the quickstart's figures over three training seeds: means, spread, which differences are within it
	$(MAKE) --jobs 2 seeded OMP_NUM_THREADS=$(HALF_OF_THE_PROCESSORS)
	$(MAKE) $(RUNS)/evaluation_seeds/report.md
	@echo
	@cat $(RUNS)/evaluation_seeds/report.md

seeded: $(SEEDED:%=$(RUNS)/%/finished) $(OF_SEEDS:%=%/finished) $(CLASSIFIERS)

$(RUNS)/evaluation_seeds/report.md: $(SEEDED:%=$(RUNS)/%/samples.npz) $(OF_SEEDS:%=%/samples.npz) \
		$(RUNS)/shards/test/manifest.json $(CLASSIFIERS)
	$(LIT) evaluate --config $(CONFIGS)/evaluate_seeds.yaml

# $(1) is the seed: of the first weights, of the order of the data, of the noise that a generator trains on, of samples.
define seed
$(RUNS)/seed_$(1)/tokenizer/finished: $(SHARDS:%=$(RUNS)/shards/%/manifest.json)
	$$(LIT) fit --config $(CONFIGS)/tokenizer.yaml --seed_everything $(1) --data.init_args.seed $(1) --run_dir $$(@D) --ckpt_path last
	@touch $$@

$(SHARDS:%=$(RUNS)/seed_$(1)/tokens/%/manifest.json): $(RUNS)/seed_$(1)/tokens/%/manifest.json: $(RUNS)/seed_$(1)/tokenizer/finished
	$$(call tokenize,$(CONFIGS),$$*)

$(SEEDED:%=$(RUNS)/seed_$(1)/%/finished): $(RUNS)/seed_$(1)/%/finished: $(SHARDS:%=$(RUNS)/seed_$(1)/tokens/%/manifest.json)
	$$(LIT) fit --config $(CONFIGS)/$$*.yaml --seed_everything $(1) --model.init_args.seed $(1) --data.init_args.seed $(1) \
		--run_dir $$(@D) \
		--model.init_args.tokenizer.init_args.checkpoint $(RUNS)/seed_$(1)/tokenizer/checkpoints/last.ckpt \
		--data.init_args.train $(RUNS)/seed_$(1)/tokens/train \
		--data.init_args.validation $(RUNS)/seed_$(1)/tokens/validation --ckpt_path last
	@touch $$@

$(SEEDED:%=$(RUNS)/seed_$(1)/%/samples.npz): $(RUNS)/seed_$(1)/%/samples.npz: $(RUNS)/seed_$(1)/%/finished
	$$(LIT) sample --config $(CONFIGS)/sample.yaml --seed $(1) --ckpt_path $$(<D)/checkpoints/last.ckpt --output $$(@D)

endef

$(foreach number,$(SEEDS),$(eval $(call seed,$(number))))

# A sampler's settings are chosen on images that the table does not use: docs/quickstart.md has the loop over settings
# for which this makes what it needs.
quickstart-select: $(SEEDED:%=$(RUNS)/%/finished) $(CLASSIFIERS) $(RUNS)/shards/validation_reference/manifest.json

# The same in colour, on the Noto emoji of npm.
EMOJI := emoji-datasource-google-16.0.0.tgz
REGISTRY = $(patsubst %/,%,$(or $(npm_config_registry),https://registry.npmjs.org))

# Its tokenizer trains alone, on all processors; what follows shares them.
quickstart-colour: $(COLOUR)/tokenizer/finished ## the same on 64-pixel colour emoji, 22 minutes on 2 cores
	$(MAKE) --jobs 2 learned-colour OMP_NUM_THREADS=$(HALF_OF_THE_PROCESSORS)
	$(MAKE) $(COLOUR)/evaluation/report.md
	@echo
	@cat $(COLOUR)/evaluation/report.md
	$(call pointed_out,pictures:     ,$(COLOUR)/masked_grid/grid.png $(COLOUR)/autoregressive_grid/grid.png,$(COLOUR))

learned-colour: $(SEEDED:%=$(COLOUR)/%/finished) $(COLOUR)/classifier/finished

$(COLOUR)/package/package.json:
	mkdir -p $(COLOUR)
	curl --fail --location --silent --show-error --output $(COLOUR)/$(EMOJI) $(REGISTRY)/emoji-datasource-google/-/$(EMOJI)
	tar xzf $(COLOUR)/$(EMOJI) -C $(COLOUR)
	rm $(COLOUR)/$(EMOJI)
	@touch $@

$(COLOUR)/shards/train/manifest.json $(COLOUR)/shards/validation/manifest.json $(COLOUR)/shards/test/manifest.json: \
		| $(COLOUR)/package/package.json

$(COLOUR)/%_grid/samples.npz: $(COLOUR)/%/finished
	$(LIT) sample --config $(COLOUR_CONFIGS)/grid.yaml --ckpt_path $(<D)/checkpoints/last.ckpt --output $(@D)

$(COLOUR)/evaluation/report.md: $(SEEDED:%=$(COLOUR)/%/samples.npz) $(SEEDED:%=$(COLOUR)/%_grid/samples.npz) \
		$(COLOUR)/shards/test/manifest.json $(COLOUR)/classifier/finished
	$(LIT) evaluate --config $(COLOUR_CONFIGS)/evaluate.yaml

# Generators of latents: of what the tokenizer has before its codebook, which then rounds what they draw.
COLOUR_further := ldm dit mar causal_mar xar
# Hybrids of ids and continuous latents. What is not rounded to ids begins from the tokenizer's weights all the same.
COLOUR_HYBRIDS := tokenbridge hart discon
COLOUR_hybrids := $(COLOUR_HYBRIDS) masked masked_decoder

colour-further: ## generators of latents on the same emoji, behind quickstart-colour
colour-hybrids: ## TokenBridge, DisCon, HART and a diffusion decoder on the same emoji, behind quickstart-colour
colour-further colour-hybrids: colour-%: $(COLOUR)/tokenizer/finished
	$(MAKE) --jobs 2 learned-$@ OMP_NUM_THREADS=$(HALF_OF_THE_PROCESSORS)
	$(MAKE) $(COLOUR)/evaluation_$*/report.md
	@echo
	@cat $(COLOUR)/evaluation_$*/report.md
	$(call pointed_out,pictures:     ,$(COLOUR_$*:%=$(COLOUR)/%_grid/grid.png),$(COLOUR))

learned-colour-further: $(COLOUR_further:%=$(COLOUR)/%/finished) $(COLOUR)/classifier/finished

# In turn: what another waits for, then what takes longest.
learned-colour-hybrids: $(COLOUR)/masked/finished $(COLOUR)/tokenizer_kl/scaled.ckpt $(COLOUR)/tokenizer_hybrid/finished \
	$(COLOUR_HYBRIDS:%=$(COLOUR)/%/finished) $(COLOUR)/decoder/finished $(COLOUR)/classifier/finished

# All weights but those of the two layers around the codebook.
$(COLOUR)/tokenizer_kl/finished $(COLOUR)/tokenizer_multi_scale/finished: $(COLOUR)/tokenizer/finished
$(COLOUR)/tokenizer_kl/finished $(COLOUR)/tokenizer_multi_scale/finished: private GIVEN := \
	--init_from $(COLOUR)/tokenizer/checkpoints/last.ckpt --init_anew '[network.encoder.9, network.decoder.0]'
$(COLOUR)/tokenbridge/finished $(COLOUR)/discon/finished $(COLOUR)/decoder/finished: $(COLOUR)/tokenizer_kl/scaled.ckpt
$(COLOUR)/discon/finished: $(COLOUR)/masked/finished
$(COLOUR)/hart/finished: $(COLOUR)/tokenizer_hybrid/finished

# They read images, and need no arrays of tokens.
$(patsubst %,$(COLOUR)/%/finished,$(COLOUR_further) $(COLOUR_HYBRIDS) decoder): $(COLOUR)/%/finished: $(COLOUR)/tokenizer/finished
	$(LIT) fit --config $(COLOUR_CONFIGS)/$*.yaml --ckpt_path last
	@touch $@

$(COLOUR)/masked_decoder/samples.npz $(COLOUR)/masked_decoder_grid/samples.npz: $(COLOUR)/masked_decoder%samples.npz: \
		$(COLOUR)/masked/finished $(COLOUR)/decoder/finished
	$(LIT) sample --config $(COLOUR_CONFIGS)/$(if $(filter _grid/,$*),grid,sample).yaml --ckpt_path $(<D)/checkpoints/last.ckpt \
		--decoder $(COLOUR)/decoder/checkpoints/last.ckpt --output $(@D)

define coloured
$(COLOUR)/evaluation_$(1)/report.md: $(COLOUR_$(1):%=$(COLOUR)/%/samples.npz) $(COLOUR_$(1):%=$(COLOUR)/%_grid/samples.npz) \
		$(COLOUR)/shards/test/manifest.json $(COLOUR)/classifier/finished
	$$(LIT) evaluate --config $(COLOUR_CONFIGS)/evaluate_$(1).yaml

endef

$(foreach part,further hybrids,$(eval $(call coloured,$(part))))

# One transformer over captions and pictures, on scikit-learn's digits: pairs drawn and read, and sums.
BOTH_WAYS := chameleon transfusion
SUMS := sums sums_thought

quickstart-digits: $(DIGITS)/tokenizer/finished ## captions to pictures and back by one model, and sums with a thought, on handwritten digits
	$(MAKE) --jobs 2 learned-digits OMP_NUM_THREADS=$(HALF_OF_THE_PROCESSORS)
	$(BIN)/python docs/experiments/digits.py --page $(DIGITS)/report.md
	$(call pointed_out,pictures:     ,$(BOTH_WAYS:%=$(DIGITS)/%/grid.png) $(SUMS:%=$(DIGITS)/%/grid.png),$(DIGITS))

learned-digits: $(BOTH_WAYS:%=$(DIGITS)/%/samples.npz) $(SUMS:%=$(DIGITS)/%/samples.npz)

digits-settings: learned-digits ## what settings of these models do, over three seeds: the softmax, embeddings, guidance
	$(BIN)/python docs/experiments/digits.py --settings --page $(DIGITS)/settings/report.md

# scikit-learn's digits, of which the quickstarts of digits and of video make their data.
DIGITS_FILE := sklearn/datasets/data/digits.csv.gz

%/$(DIGITS_FILE): | .venv/installed
	$(BIN)/pip download --quiet --no-deps --only-binary=:all: --dest $* scikit-learn
	cd $* && $(abspath $(BIN))/python -m zipfile --extract scikit_learn-*.whl wheel
	mkdir -p $(@D)
	mv $*/wheel/$(DIGITS_FILE) $@
	rm -r $*/wheel $*/scikit_learn-*.whl

$(SHARDS:%=$(DIGITS)/shards/%/manifest.json) $(SUMS:%=$(DIGITS)/shards/%/manifest.json) \
		$(SUMS:%=$(DIGITS)/shards/%_validation/manifest.json): | $(DIGITS)/$(DIGITS_FILE)

$(DIGITS)/words.json: $(DIGITS)/shards/train/manifest.json
	$(LIT) text_tokenizer --shards $(<D) --vocab_size 400 --output $@

$(BOTH_WAYS:%=$(DIGITS)/%/finished): $(DIGITS)/%/finished: $(DIGITS)/tokenizer/finished $(DIGITS)/words.json
	$(LIT) fit --config $(DIGITS_CONFIGS)/$*.yaml --ckpt_path last
	@touch $@

$(SUMS:%=$(DIGITS)/%/finished): $(DIGITS)/%/finished: $(DIGITS)/tokenizer/finished $(DIGITS)/words.json \
		$(DIGITS)/shards/%/manifest.json $(DIGITS)/shards/%_validation/manifest.json
	$(LIT) fit --config $(DIGITS_CONFIGS)/$*.yaml --ckpt_path last
	@touch $@

$(SUMS:%=$(DIGITS)/%/samples.npz): $(DIGITS)/%/samples.npz: $(DIGITS)/%/finished
	$(LIT) sample --config $(DIGITS_CONFIGS)/sample_sums.yaml --ckpt_path $(<D)/checkpoints/last.ckpt --output $(@D)

quickstart-audio: $(AUDIO)/codec/finished ## a codec of speech, and two digits said from a text
	$(MAKE) --jobs 2 learned-audio OMP_NUM_THREADS=$(HALF_OF_THE_PROCESSORS)
	$(BIN)/python docs/experiments/audio.py --output $(AUDIO)
	$(call pointed_out,to listen to: ,$(AUDIO)/listen $(AUDIO)/speech/samples/clips,$(AUDIO))

SOUNDS := $(AUDIO)/package/usr/share/asterisk/sounds/en_US_f_Allison

$(SOUNDS): | .venv/installed
	mkdir -p $(AUDIO)/package
	cd $(AUDIO) && apt-get download asterisk-core-sounds-en-wav && dpkg -x asterisk-core-sounds-en-wav*.deb package

$(AUDIO)/shards/train/manifest.json: | $(SOUNDS)
	$(LIT) shards --config $(AUDIO_CONFIGS)/shards.yaml

$(AUDIO)/shards/test/manifest.json: | $(SOUNDS)
	$(LIT) shards --config $(AUDIO_CONFIGS)/shards.yaml --source.init_args.split test --split test --output $(@D)

$(AUDIO)/words/train/manifest.json: | $(SOUNDS)
	$(LIT) shards --config $(AUDIO_CONFIGS)/words.yaml

$(AUDIO)/words/test/manifest.json: | $(SOUNDS)
	$(LIT) shards --config $(AUDIO_CONFIGS)/words.yaml --source.init_args.split test --source.init_args.count 200 \
		--split test --output $(@D)

$(AUDIO)/words.json: $(AUDIO)/words/train/manifest.json
	$(LIT) text_tokenizer --shards $(<D) --vocab_size 300 --output $@

$(AUDIO)/codec/finished: $(AUDIO)/shards/train/manifest.json $(AUDIO)/shards/test/manifest.json
	$(LIT) fit --config $(AUDIO_CONFIGS)/codec.yaml --ckpt_path last
	@touch $@

$(AUDIO)/evaluation/report.md: $(AUDIO)/codec/finished
	$(LIT) evaluate_audio --config $(AUDIO_CONFIGS)/evaluate.yaml

$(AUDIO)/tokens/train/manifest.json $(AUDIO)/tokens/validation/manifest.json: $(AUDIO)/tokens/%/manifest.json: \
		$(AUDIO)/codec/finished $(AUDIO)/words/train/manifest.json $(AUDIO)/words/test/manifest.json
	$(LIT) tokenize --config $(AUDIO_CONFIGS)/tokens.yaml --split $* --output $(@D)

learned-audio: $(AUDIO)/speech/samples/samples.npz $(AUDIO)/decoder/finished $(AUDIO)/evaluation/report.md

$(AUDIO)/speech/finished: $(AUDIO)/tokens/train/manifest.json $(AUDIO)/tokens/validation/manifest.json $(AUDIO)/words.json
	$(LIT) fit --config $(AUDIO_CONFIGS)/speech.yaml --ckpt_path last
	@touch $@

$(AUDIO)/decoder/finished: $(AUDIO)/codec/finished
	$(LIT) fit --config $(AUDIO_CONFIGS)/decoder.yaml --ckpt_path last
	@touch $@

$(AUDIO)/speech/samples/samples.npz: $(AUDIO)/speech/finished
	$(LIT) sample --config $(AUDIO_CONFIGS)/sample.yaml

# Digits that move, as clips: by digit, of any digit (label 10 is none), continued, and filled in.
VIDEO := runs/quickstart_video
VIDEO_CONFIGS := lightning_configs/quickstart_video
DRAWN_CLIPS := $(SEEDED) $(SEEDED:%=%_any) continued filled_in

quickstart-video: ## a tokenizer of clips, and moving digits drawn, continued and filled in
	$(MAKE) --jobs 2 learned-video OMP_NUM_THREADS=$(HALF_OF_THE_PROCESSORS)
	$(MAKE) $(VIDEO)/evaluation/report.md
	@echo
	@cat $(VIDEO)/evaluation/report.md
	@echo
	$(BIN)/python docs/experiments/video.py measure
	$(call pointed_out,to look at:   ,$(DRAWN_CLIPS:%=$(VIDEO)/%/samples.gif),$(VIDEO))

learned-video: $(DRAWN_CLIPS:%=$(VIDEO)/%/samples.npz) $(VIDEO)/classifier/finished

$(SHARDS:%=$(VIDEO)/shards/%/manifest.json): | $(VIDEO)/$(DIGITS_FILE)

$(VIDEO)/%_any/samples.npz: $(VIDEO)/%/finished
	$(LIT) sample --config $(VIDEO_CONFIGS)/sample.yaml --ckpt_path $(<D)/checkpoints/last.ckpt --output $(@D) --labels '[10]'

$(VIDEO)/continued/samples.npz: $(VIDEO)/autoregressive/finished
	$(LIT) sample --config $(VIDEO_CONFIGS)/sample_continued.yaml --ckpt_path $(<D)/checkpoints/last.ckpt --output $(@D)

$(VIDEO)/filled_in/samples.npz: $(VIDEO)/masked/finished
	$(LIT) sample --config $(VIDEO_CONFIGS)/sample_continued.yaml --ckpt_path $(<D)/checkpoints/last.ckpt --output $(@D) \
		--known_positions '[0, 4]'

$(VIDEO)/evaluation/report.md: $(DRAWN_CLIPS:%=$(VIDEO)/%/samples.npz) $(VIDEO)/classifier/finished
	$(LIT) evaluate_video --config $(VIDEO_CONFIGS)/evaluate.yaml

# The emoji and their names, drawn and read by one model.
NAMED := runs/quickstart_emoji
NAMED_CONFIGS := lightning_configs/quickstart_emoji
NAMED_SPLITS := train combinations test

quickstart-emoji: $(NAMED)/transfusion/samples.npz $(NAMED_SPLITS:%=$(NAMED)/shards/%/manifest.json) ## names to emoji and back by one model, 38 minutes of one core
	$(BIN)/python docs/experiments/emoji.py --page $(NAMED)/report.md
	$(call pointed_out,pictures:     ,$(NAMED)/transfusion/grid.png,$(NAMED))

$(NAMED_SPLITS:%=$(NAMED)/shards/%/manifest.json): | $(COLOUR)/package/package.json

$(NAMED)/words.json: $(NAMED)/shards/train/manifest.json
	$(LIT) text_tokenizer --shards $(<D) --vocab_size 800 --output $@

$(NAMED)/transfusion/finished: $(NAMED)/words.json $(NAMED)/shards/combinations/manifest.json
	$(LIT) fit --config $(NAMED_CONFIGS)/transfusion.yaml --ckpt_path last
	@touch $@

# The comparison goes on from the quickstart, whose tokenizer and classifiers it shares. Its three seeds are of the
# generators, all of them trained on equally many batches, and of their samples. Two commands share the processors all
# along, so the speeds in the table are of half of them.
COMPARED := $(RUNS)/comparison
BATCHES := 340
BATCH_SIZE := 64
ON_FSQ := masked autoregressive rar uniform
ON_LFQ := bar maskbit binary_flow
ON_SCALES := next_scale
ON_HYBRID := hart
ON_LATENTS := mar dit causal_mar xar tokenbridge continuous_next_scale
ON_BOTH := discon mixar
# What saves time and does as well here: half of the recipe's draws of time for a vector, spread evenly, and a quarter of
# the evaluations for a bound of the likelihood.
SPREAD := mar discon
BOUNDED := masked maskbit
# In turn: what another waits for, then what takes longest, so that at the end no processor waits for the other.
FAMILIES := masked discon next_scale mar dit maskbit bar rar autoregressive
# Those that it leaves out for its time: `make comparison-further` has them, with one seed.
FURTHER := mixar hart continuous_next_scale xar causal_mar binary_flow tokenbridge uniform
SAMPLERS := halton titok random_order
COMPARED_SEEDS := 0 $(SEEDS)

comparison: ## train all families of generators on one backbone, with three seeds, and compare them
	$(MAKE) --jobs 2 drawn OMP_NUM_THREADS=$(HALF_OF_THE_PROCESSORS)
	$(MAKE) $(COMPARED)/report.md OMP_NUM_THREADS=$(HALF_OF_THE_PROCESSORS)
	@echo
	@cat $(COMPARED)/report.md

DRAWN := $(foreach family,$(FAMILIES),$(COMPARED_SEEDS:%=$(COMPARED)/seed_%/$(family)/samples.npz))

drawn: $(DRAWN) $(CLASSIFIERS)

comparison-further: ## train the families that it leaves out, with one seed, and compare them
	$(MAKE) --jobs 2 drawn-further OMP_NUM_THREADS=$(HALF_OF_THE_PROCESSORS)
	$(MAKE) $(COMPARED)/further/report.md OMP_NUM_THREADS=$(HALF_OF_THE_PROCESSORS)
	@echo
	@cat $(COMPARED)/further/report.md

DRAWN_FURTHER := $(FURTHER:%=$(COMPARED)/seed_0/%/samples.npz)

drawn-further: $(DRAWN_FURTHER) $(CLASSIFIERS)

comparison-samplers: ## draw from its masked generators by four samplers, and compare these
	$(MAKE) --jobs 2 drawn-otherwise OMP_NUM_THREADS=$(HALF_OF_THE_PROCESSORS)
	$(MAKE) $(COMPARED)/samplers/report.md OMP_NUM_THREADS=$(HALF_OF_THE_PROCESSORS)
	@echo
	@cat $(COMPARED)/samplers/report.md

DRAWN_OTHERWISE := $(foreach seed,$(COMPARED_SEEDS),$(patsubst %,$(COMPARED)/seed_$(seed)/%/samples.npz,masked $(SAMPLERS:%=masked_%)))

drawn-otherwise: $(DRAWN_OTHERWISE) $(CLASSIFIERS)

# $(1) is the seed: of the first weights, of the order of the data, of the noise that a generator trains on, of samples.
define compared
$(ON_FSQ:%=$(COMPARED)/seed_$(1)/%/finished): $(SHARDS:%=$(RUNS)/tokens/%/manifest.json)
$(ON_LFQ:%=$(COMPARED)/seed_$(1)/%/finished): $(SHARDS:%=$(RUNS)/tokens_lfq/%/manifest.json)
$(ON_SCALES:%=$(COMPARED)/seed_$(1)/%/finished): $(SHARDS:%=$(RUNS)/tokens_multi_scale/%/manifest.json)
$(ON_LATENTS:%=$(COMPARED)/seed_$(1)/%/finished): $(SHARDS:%=$(RUNS)/latents_kl/%/manifest.json)
$(ON_HYBRID:%=$(COMPARED)/seed_$(1)/%/finished): $(RUNS)/tokenizer_hybrid/finished
$(ON_BOTH:%=$(COMPARED)/seed_$(1)/%/finished): $(RUNS)/tokenizer_kl/scaled.ckpt $(COMPARED)/seed_$(1)/masked/finished
$(ON_BOTH:%=$(COMPARED)/seed_$(1)/%/finished): private GIVEN := \
	--model.init_args.discrete.init_args.checkpoint $(COMPARED)/seed_$(1)/masked/checkpoints/last.ckpt
$(COMPARED)/seed_$(1)/mixar/finished: private OVER := --config $(CONFIGS)/discon.yaml
$(SPREAD:%=$(COMPARED)/seed_$(1)/%/finished): private SPARED := \
	--model.init_args.head.init_args.repeats 4 --model.init_args.head.init_args.stratified true
$(BOUNDED:%=$(COMPARED)/seed_$(1)/%/finished): private SPARED := --model.init_args.likelihood_samples 4

$(patsubst %,$(COMPARED)/seed_$(1)/%/finished,$(FAMILIES) $(FURTHER)): $(COMPARED)/seed_$(1)/%/finished:
	$$(LIT) fit $$(OVER) --config $(CONFIGS)/$$*.yaml --seed_everything $(1) --model.init_args.seed $(1) --data.init_args.seed $(1) \
		--trainer.max_steps $(BATCHES) --trainer.limit_val_batches 0 --data.init_args.batch_size $(BATCH_SIZE) \
		--model.init_args.scheduler.init_args.total_steps $(BATCHES) \
		--run_dir $$(@D) $$(GIVEN) $$(SPARED) --ckpt_path last
	@touch $$@

$(patsubst %,$(COMPARED)/seed_$(1)/%/samples.npz,$(FAMILIES) $(FURTHER)): $(COMPARED)/seed_$(1)/%/samples.npz: $(COMPARED)/seed_$(1)/%/finished
	$$(LIT) sample --config $(CONFIGS)/sample.yaml --seed $(1) --ckpt_path $$(<D)/checkpoints/last.ckpt --output $$(@D)

$(SAMPLERS:%=$(COMPARED)/seed_$(1)/masked_%/samples.npz): $(COMPARED)/seed_$(1)/masked_%/samples.npz: \
		$(COMPARED)/seed_$(1)/masked/finished
	$$(LIT) sample --config $(CONFIGS)/sample_$$*.yaml --seed $(1) --ckpt_path $$(<D)/checkpoints/last.ckpt --output $$(@D)

endef

$(foreach number,$(COMPARED_SEEDS),$(eval $(call compared,$(number))))

$(SHARDS:%=$(RUNS)/latents_kl/%/manifest.json): $(RUNS)/latents_kl/%/manifest.json: $(RUNS)/tokenizer_kl/scaled.ckpt
	rm -rf $(@D)
	$(LIT) tokenize --config $(CONFIGS)/latents.yaml --split $* --output $(@D)

# HART's generator reads images.
$(RUNS)/hart/finished: $(RUNS)/tokenizer_hybrid/finished

$(COMPARED)/report.md: $(RUNS)/shards/test/manifest.json $(CLASSIFIERS) $(DRAWN)
	$(LIT) evaluate --config $(CONFIGS)/comparison.yaml --devices 2

$(COMPARED)/samplers/report.md: $(RUNS)/shards/test/manifest.json $(CLASSIFIERS) $(DRAWN_OTHERWISE)
	$(LIT) evaluate --config $(CONFIGS)/comparison_samplers.yaml --devices 2

$(COMPARED)/further/report.md: $(RUNS)/shards/test/manifest.json $(CLASSIFIERS) $(DRAWN_FURTHER)
	$(LIT) evaluate --config $(CONFIGS)/comparison_further.yaml --devices 2

# A pipeline: shards, classifiers, tokenizers, their tokens, generators on these, samples. $(1) is the folder of its
# runs, which its recipes name too, and $(2) that of its recipes.
define pipeline
$(1)/shards/train/manifest.json: | .venv/installed
	$$(LIT) shards --config $(2)/shards.yaml

$(1)/shards/%/manifest.json: | .venv/installed
	$$(LIT) shards --config $(2)/shards_$$*.yaml

$(1)/classifier/finished: $(SHARDS:%=$(1)/shards/%/manifest.json)
	$$(LIT) fit --config $(2)/classifier.yaml --ckpt_path last
	@touch $$@

$(1)/classifier_apart/finished: $(1)/shards/apart/manifest.json $(1)/shards/validation/manifest.json
	$$(LIT) fit --config $(2)/classifier_apart.yaml --ckpt_path last
	@touch $$@

$(1)/tokenizer/finished: $(SHARDS:%=$(1)/shards/%/manifest.json)
	$$(LIT) fit --config $(2)/tokenizer.yaml --ckpt_path last
	@touch $$@

$(1)/tokenizer_%/finished: $(SHARDS:%=$(1)/shards/%/manifest.json)
	$$(LIT) fit --config $(2)/tokenizer_$$*.yaml $$(GIVEN) --ckpt_path last
	@touch $$@

# HART's begins with the multi-scale one.
$(1)/tokenizer_hybrid/finished: $(1)/tokenizer_multi_scale/finished

$(1)/tokenizer_kl/scaled.ckpt: $(1)/tokenizer_kl/finished
	$$(LIT) measure_latents --config $(2)/latents_scale.yaml

$(1)/tokens/%/manifest.json: $(1)/tokenizer/finished
	$$(call tokenize,$(2),$$*)

$(1)/tokens_%/train/manifest.json: $(1)/tokenizer_%/finished
	$$(call tokenize,$(2),train)

$(1)/tokens_%/validation/manifest.json: $(1)/tokenizer_%/finished
	$$(call tokenize,$(2),validation)

$(1)/%/finished: $(SHARDS:%=$(1)/tokens/%/manifest.json)
	$$(LIT) fit --config $(2)/$$*.yaml --ckpt_path last
	@touch $$@

$(1)/%/samples.npz: $(1)/%/finished
	$$(LIT) sample --config $(2)/sample.yaml --ckpt_path $$(<D)/checkpoints/last.ckpt --output $$(@D)

# What a pattern makes is kept, also on the way to something else.
.PRECIOUS: $(1)/%/finished $(1)/tokenizer_%/finished $(1)/%/samples.npz $(1)/tokens/%/manifest.json \
	$(1)/tokens_%/train/manifest.json $(1)/tokens_%/validation/manifest.json $(1)/shards/%/manifest.json
endef

# Of a split, $(2), by the tokenizer of the first prerequisite.
define tokenize
rm -rf $(@D)
$(LIT) tokenize --config $(1)/tokens.yaml --ckpt_path $(<D)/checkpoints/last.ckpt --split $(2) --output $(@D)
endef

$(eval $(call pipeline,$(RUNS),$(CONFIGS)))
$(eval $(call pipeline,$(COLOUR),$(COLOUR_CONFIGS)))
$(eval $(call pipeline,$(DIGITS),$(DIGITS_CONFIGS)))
$(eval $(call pipeline,$(NAMED),$(NAMED_CONFIGS)))
$(eval $(call pipeline,$(VIDEO),$(VIDEO_CONFIGS)))

.PRECIOUS: $(COLOUR)/%_grid/samples.npz
