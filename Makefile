# Two commands on a machine with Python 3.11+, make and git:
#
#     make edit    teach SmolLM2-135M-Instruct the facts in recipes/facts.json, and show what that did
#     make test    run the whole test suite
#
# Both make the environment .venv first. Running them again redoes only what is missing or outdated.

PYTHON ?= python3
BIN := .venv/bin
# So that the recipes below are literally what a user types.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: edit test clean
.DELETE_ON_ERROR:

edit: work/comparison/comparison.md
	@cat $<
	@echo "This table: $<   The edited model: out/"

# What a fact or a recipe changed makes outdated, training must not resume from.
work/rsft.inputs: recipes/rsft.yaml work/facts/facts.json
	rm -rf work/rsft
	@touch $@

work/comparison/comparison.md: out/config.json
	mm4ke compare --base work/base --rsft work/rsft --merged out --facts recipes/facts.json \
		--output work/comparison > /dev/null  # `edit` shows it, new or not

out/config.json: recipes/merge.yaml work/rsft/trainer_state.json
	mergekit-yaml recipes/merge.yaml out/

# An interrupted training goes on from its last checkpoint. The state is written last, after the weights.
work/rsft/trainer_state.json: work/rsft.inputs | work/base/config.json
	llamafactory-cli train recipes/rsft.yaml

work/facts/facts.json: recipes/facts.json | $(BIN)/.hosts
	mm4ke facts recipes/facts.json --output work/facts

work/base/config.json: | $(BIN)/.hosts
	mm4ke model --link work/base

test: $(BIN)/.test
	OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile

$(BIN)/.hosts: pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
		|| { echo "$(PYTHON) is older than Python 3.11; give a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	pip install --editable ".[hosts]"
	@touch $@

$(BIN)/.test: $(BIN)/.hosts
	pip install --editable ".[hosts,test]"
	@touch $@

clean:
	rm -rf work out
