# The two commands of a fresh machine: `make demo` and `make test`. Both make .venv first if it is not there.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint faults weights guidance-study clean

demo: .venv/installed
	$(BIN)/clipkit demo

test: .venv/installed lint
	$(BIN)/python -m pytest

# The fault matrix of docs/reliability.md with its nightly counts: an hour or so.
faults: .venv/installed
	$(BIN)/python -m pytest tests/faults tests/clipkit/test_remote.py --nightly

# Every kind of guidance over scales and steps, on the demo's runs.
guidance-study: demo
	$(BIN)/python benchmarks/guidance_study.py --runs runs/demo --out runs/study

# clipkit-tiny, from DATA (tiny-imagenet-32/ and noto-emoji/ in it): some three and a half hours on 2 CPU cores. Each part goes on where
# it was stopped.
DATA ?= ../shared/data
weights: .venv/installed
	$(BIN)/clipkit pack $(DATA)/tiny-imagenet-32/train.tar.xz packs/tiny-imagenet --classnames train/recipes/tiny_imagenet_names.json
	$(BIN)/clipkit pack $(DATA)/tiny-imagenet-32/val.tar.xz packs/tiny-imagenet-val --classnames train/recipes/tiny_imagenet_names.json
	$(BIN)/clipkit pack $(DATA)/noto-emoji/images.tar.xz packs/emoji --csv $(DATA)/noto-emoji/captions.csv --holdout 500
	$(BIN)/clipkit pack drawings packs/drawings --count 20000
	$(BIN)/clipkit pretrain tiny_imagenet_clip.toml
	$(BIN)/clipkit pretrain clipkit_tiny_clip.toml
	$(BIN)/clipkit demo --out runs/demo
	$(BIN)/clipkit denoiser clipkit_tiny_denoiser.toml
	rm -rf clipkit/data/clipkit-tiny/clip clipkit/data/clipkit-tiny/denoiser clipkit/data/clipkit-tiny/noisy_clip
	$(BIN)/clipkit release runs/clipkit-tiny clipkit/data/clipkit-tiny
	$(BIN)/clipkit release runs/demo/noisy_clip clipkit/data/clipkit-tiny

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# For the type checker, the layout that an installed clipkit has: the rooms inside the package.
	mkdir -p build/types/clipkit && ln -sfn $(CURDIR)/clipkit/* $(CURDIR)/train $(CURDIR)/zeroshot $(CURDIR)/guidance build/types/clipkit
	MYPYPATH=build/types $(BIN)/mypy -p clipkit

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -e ".[test,app,plot,parity,track]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info runs packs
