# The two commands of a fresh machine: `make demo` and `make test`. Both make .venv first if it is not there.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint docs site faults guidance-study guidance-study-photographs tiny-imagenet weights clean

# Tiny ImageNet and the emoji (tiny-imagenet-32/, noto-emoji/), which are not in this repository.
DATA ?= ../shared/data
# The CLIPs of clipkit-tiny: as many ranks as theirs had, a thread each. Theirs had run.sync_batchnorm = false: BatchNorm's statistics were those of a rank.
RANKS := OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node 2

demo: .venv/installed
	$(BIN)/clipkit demo

test: .venv/installed lint site
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# The fault matrix of docs/reliability.md with its nightly counts, and the benchmarks that are too long for a push: an hour or so.
faults: .venv/installed
	$(BIN)/python -m pytest tests/faults tests/clipkit/data/test_remote.py tests/test_benchmarks.py --nightly

# Every kind of guidance over scales and steps: on the demo's runs, and where DATA has tiny-imagenet-32/ on photographs too, for
# which a CLIP, a judge, a denoiser and a noise-aware CLIP are trained first (four hours on 2 CPU cores).
guidance-study: demo
	$(BIN)/python benchmarks/guidance_study.py --runs runs/demo --out runs/study
	test ! -d $(DATA)/tiny-imagenet-32 || $(MAKE) guidance-study-photographs

PHOTOGRAPHS := "goldfish,jellyfish,king penguin,brown bear,lion,ladybug,monarch,school bus,sports car,steel arch bridge,$\
	banana,lemon,orange,pizza,seashore,alp"
guidance-study-photographs: .venv/installed tiny-imagenet
	$(BIN)/clipkit pretrain tiny_imagenet_clip.toml
	$(BIN)/clipkit pretrain tiny_imagenet_clip.toml run.seed=1 run.steps=600 optim.warmup=60 run.out=runs/tiny-imagenet/judge
	$(BIN)/clipkit denoiser tiny_imagenet_denoiser.toml
	$(BIN)/clipkit noisy-clip tiny_imagenet_noisy_clip.toml
	$(BIN)/python benchmarks/guidance_study.py --runs runs/tiny-imagenet --out runs/study-photographs \
		--pack packs/tiny-imagenet --names $(PHOTOGRAPHS) --steps 25 --train run.steps=450 run.batch_size=256

tiny-imagenet: .venv/installed
	$(BIN)/clipkit pack $(DATA)/tiny-imagenet-32/train.tar.xz packs/tiny-imagenet --classnames train/recipes/tiny_imagenet_names.json
	$(BIN)/clipkit pack $(DATA)/tiny-imagenet-32/val.tar.xz packs/tiny-imagenet-val --classnames $(DATA)/tiny-imagenet-32/classes.json

# clipkit-tiny: six and a half hours on 2 CPU cores that compute in bf16, longer on others. Each part continues where it was stopped.
weights: .venv/installed tiny-imagenet
	$(BIN)/clipkit pack $(DATA)/noto-emoji/images.tar.xz packs/emoji --csv $(DATA)/noto-emoji/captions.csv --holdout 500
	$(BIN)/clipkit pack drawings packs/drawings --count 20000
	$(RANKS) train/pretrain.py tiny_imagenet_clip.toml
	$(RANKS) train/pretrain.py clipkit_tiny_text_clip.toml
	$(RANKS) train/pretrain.py clipkit_tiny_clip.toml
	$(RANKS) train/pretrain.py clipkit_tiny_more_clip.toml
	test -d runs/average/checkpoints || $(BIN)/clipkit average runs/more runs/clipkit-tiny runs/average --shares 0.7,0.3
	$(RANKS) train/pretrain.py clipkit_tiny_distilled_clip.toml
	$(BIN)/clipkit demo --out runs/demo
	$(BIN)/clipkit denoiser clipkit_tiny_denoiser.toml
	rm -rf clipkit/assets/clipkit-tiny/clip clipkit/assets/clipkit-tiny/denoiser clipkit/assets/clipkit-tiny/noisy_clip
	$(BIN)/clipkit release runs/distilled clipkit/assets/clipkit-tiny
	$(BIN)/clipkit release runs/clipkit-tiny/denoiser clipkit/assets/clipkit-tiny
	$(BIN)/clipkit release runs/demo/noisy_clip clipkit/assets/clipkit-tiny

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p clipkit
	$(BIN)/codespell

# The site in build/site, after its generated pages; a dead link or an undocumented public name fails. `python docs/run.py` renews the
# output that the tutorials and the README show.
docs: .venv/installed
	$(BIN)/python docs/generate.py
	$(MAKE) site

site: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -e ".[test,docs,app,plot,parity,track]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info runs packs
