# Winnow. `make help` lists the targets. RECIPE= and STORE= choose what and where; ARGS= passes on to the command.

PYTHON ?= python3
RECIPE ?= embedded
STORE ?= runs/demo
ARGS ?=
VENV := .venv
READY := $(VENV)/.ready
WINNOW := $(VENV)/bin/winnow
IN := --recipe $(RECIPE) --store $(STORE) $(ARGS)

.DEFAULT_GOAL := help
STAGES := prompts generate embed score refine distance select tournament weigh export train evaluate guard round
STUDIES := $(addprefix study-, ablation size weights accumulation reference mix real few whole)
.PHONY: help setup demo test $(STAGES) loop doctor plan report sql explain similar search diff replay label publish \
  verify base study $(STUDIES) bench benchmark-ipr benchmark-refine benchmark-late lint lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(READY) ## make .venv/ with the winnow command in it

demo: $(READY) ## set up, run both arms of the embedded default, write a report (ARGS=--fast: below 2 minutes)
	$(WINNOW) demo --store $(STORE) $(ARGS)

test: $(READY) ## set up and run the tests
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

prompts: $(READY) ## curate prompts (ARGS="--source prompts.txt")
	$(WINNOW) prompts $(IN)
generate: $(READY) ## sample images for the round's prompts
	$(WINNOW) generate $(IN)
embed: $(READY) ## embed the samples
	$(WINNOW) embed $(IN)
score: $(READY) ## score the samples
	$(WINNOW) score $(IN)
refine: $(READY) ## make chosen candidates anew, whole or in part (ARGS="--where 'width > 0'")
	$(WINNOW) refine $(IN)
distance: $(READY) ## measure how far the samples lie from D_0
	$(WINNOW) distance $(IN)
select: $(READY) ## keep the preferred samples, with a reason for every other
	$(WINNOW) select $(IN)
tournament: $(READY) ## compare policies over the round's candidates, before one is trained on
	$(WINNOW) tournament $(IN)
weigh: $(READY) ## weigh the kept samples by their distance
	$(WINNOW) weigh $(IN)
export: $(READY) ## write the selection as weighted training shards
	$(WINNOW) export $(IN)
train: $(READY) ## fine-tune the round's start model on its shards
	$(WINNOW) train $(IN)
evaluate: $(READY) ## measure the round's model on held-out prompts
	$(WINNOW) evaluate $(IN)
guard: $(READY) ## give the verdict over the round's model
	$(WINNOW) guard $(IN)
round: $(READY) ## play one whole round
	$(WINNOW) round $(IN)
loop: $(READY) ## play rounds until the guard ends them (ROUNDS=8)
	$(WINNOW) loop $(IN) $(if $(ROUNDS),--rounds $(ROUNDS))

doctor: $(READY) ## say what of a recipe cannot run here, and the cure (RECIPE=sdxl-lora)
	$(WINNOW) doctor $(IN)
plan: $(READY) ## say what a run will take: images, disk and GPU-hours (RECIPE=sdxl-lora)
	$(WINNOW) plan --recipe $(RECIPE) $(ARGS)

ASK := SELECT round, arm, verdict, reason FROM rounds ORDER BY arm, round
report: $(READY) ## write report.html and summary.json into the store
	$(WINNOW) report --store $(STORE) $(ARGS)
sql: $(READY) ## ask the store (Q="SELECT * FROM rounds")
	$(WINNOW) sql --store $(STORE) $(ARGS) '$(subst ','\'',$(if $(Q),$(Q),$(ASK)))'
explain: $(READY) ## tell why a sample was kept or dropped (ID=…)
	$(WINNOW) explain --store $(STORE) $(ARGS) $(ID)
similar: $(READY) ## find the samples most like one (ID=…)
	$(WINNOW) similar --store $(STORE) $(ARGS) $(ID)
search: $(READY) ## find the samples most like a text (TEXT="a red seven")
	$(WINNOW) search --store $(STORE) $(ARGS) '$(subst ','\'',$(TEXT))'
diff: $(READY) ## tell what changed from one round to another (ROUNDS="1 2")
	$(WINNOW) diff --store $(STORE) $(ARGS) $(ROUNDS)
replay: $(READY) ## make a sample's image again from its row, and compare (ID=…)
	$(WINNOW) replay --store $(STORE) $(ARGS) $(ID)
label: $(READY) ## vote on a local page: pick candidates (ARGS=pairs: compare models)
	$(WINNOW) label --store $(STORE) $(ARGS)
publish: $(READY) ## publish a selection to the Hub (REPO=user/name; ARGS="--what store", model; --dry-run FOLDER)
	$(WINNOW) publish --to '$(REPO)' --store $(STORE) $(if $(filter file,$(origin RECIPE)),,--recipe $(RECIPE)) $(ARGS)
verify: $(READY) ## check every sealed part against its SHA-256 and schema
	$(WINNOW) verify --store $(STORE) $(ARGS)

base: $(READY) ## build the models of the embedded default (DATA=mnist_train.npz; empty: scikit-learn's digits)
	$(WINNOW) base --data "$(DATA)" $(ARGS)
study: $(READY) ## confirm the effect: three seeds, eight rounds, into results/
	$(WINNOW) study $(ARGS)
study-ablation: $(READY) ## what each part of the round does (three seeds, three rounds, smaller; so the next five)
	$(WINNOW) study ablation $(ARGS)
study-size: $(READY) ## how many samples a round should select
	$(WINNOW) study size $(ARGS)
study-weights: $(READY) ## how far from D_0 a sample may be, and how fast its weight falls beyond
	$(WINNOW) study weights $(ARGS)
study-accumulation: $(READY) ## train on the selections of all rounds, or on the last one alone
	$(WINNOW) study accumulation $(ARGS)
study-reference: $(READY) ## a share of D_0 beside the selection
	$(WINNOW) study reference $(ARGS)
study-mix: $(READY) ## what another choice does in the place of one of the default's
	$(WINNOW) study mix $(ARGS)
study-real: $(READY) ## real scenes as D_0 and beside the selection (three seeds, eight rounds, smaller)
	$(WINNOW) study real $(ARGS)
study-few: $(READY) ## the same, where there is one real scene for each caption
	$(WINNOW) study few $(ARGS)
study-whole: $(READY) ## real scenes beside the selection and alone, in eight rounds of the whole size
	$(WINNOW) study whole $(ARGS)

bench: $(READY) ## measure ratios to other ways of doing the same, into results/ (ARGS=generation)
	$(VENV)/bin/python -m bench $(ARGS)

benchmark-ipr: $(READY) ## measure iterative partial refinement, into results/ (ARGS="sudoku4 --train": train it first)
	$(VENV)/bin/python -m jobs.ipr $(ARGS)

benchmark-refine: $(READY) ## what evaluations are best spent on: selection, early rejection, refinement; into results/
	$(VENV)/bin/python -m jobs.benchmarks refine $(ARGS)
benchmark-late: $(READY) ## train models of late steps and measure what they repair, into results/ (DATA=mnist_train.npz)
	$(VENV)/bin/python -m jobs.benchmarks late $(if $(DATA),--data "$(DATA)") $(ARGS)

lint: $(READY) ## check the style and the direction of the imports
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports
lock: $(READY) ## pin what is installed now in constraints.txt
	$(VENV)/bin/pip freeze --exclude-editable | grep -v '^#' > constraints.txt
clean: ## remove what can be made again: .venv/ and caches (stores in runs/ stay)
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
