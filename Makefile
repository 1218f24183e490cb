# Five commands on a machine with Python 3.11+, make and git:
#
#     make edit    teach SmolLM2-135M-Instruct the facts in recipes/facts.json, and show what that did
#                  MODEL=org/name FACTS=FILE TEMPLATE=NAME: another model (a folder or a hub id) and other facts, by
#                  `mm4ke edit`, which says what it runs; OUTPUT=DIR takes another folder than work/edit
#     make test    check the code's form (make lint), and run the whole test suite
#     make faults  break every command in the middle, about 60 times, and show what was left of it
#     make bench   measure speed and memory; FACTS=FILE takes other facts than recipes/facts.json
#     make docs    write recipes/mm4ke.md, the reference of the command, anew
#
# All make the environment .venv first. Running them again redoes only what is missing or outdated.

PYTHON ?= python3
BIN := .venv/bin
# So that the recipes below are literally what a user types.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# OpenMP's threads sleep while they wait for each other. Spinning, training takes many times longer beside other work.
export OMP_WAIT_POLICY ?= passive

.PHONY: edit lint test faults bench docs clean
.DELETE_ON_ERROR:

# Any one of the three, so that a command which lacks the others says so instead of showing the example.
ifneq ($(MODEL)$(FACTS)$(TEMPLATE),)
edit: $(BIN)/.hosts
	mm4ke edit $(if $(MODEL),--model '$(MODEL)') $(if $(FACTS),--facts '$(FACTS)') \
		$(if $(TEMPLATE),--template '$(TEMPLATE)') $(if $(OUTPUT),--output '$(OUTPUT)')
else
edit: out/config.json
	@# Side by side they take two thirds of the time. Only one of them shows its progress.
	@$(MAKE) --no-print-directory --jobs=2 work/comparison/comparison.md work/report/report.html
	@cat work/comparison/comparison.md
	@echo "This table: work/comparison/comparison.md   The edited model: out/"
	@echo "The report: $(CURDIR)/work/report/report.html"
endif

# Of other facts or another recipe, training refuses what is there. Where it is the facts, another command may have put
# its own into work/facts.
work/rsft.inputs: recipes/rsft.yaml work/facts/facts.json
	mm4ke facts recipes/facts.json --output work/facts
	rm -rf work/rsft work/rsft.delta.safetensors
	@touch $@

work/report/report.html: work/eval/rsft.done work/eval/merged.done
	mm4ke report R-SFT=work/eval/rsft merged=work/eval/merged --output work/report

# lm-eval adds to a folder with every run; the report is to show the last one only. What the model says freely is
# asked of the merged one alone, since that takes minutes on a CPU.
work/eval/rsft.done: recipes/knowedit.yaml work/rsft/trainer_state.json
	rm -rf work/eval/rsft
	lm_eval run --config recipes/knowedit.yaml --model_args pretrained=work/rsft,reference=work/base \
		--tasks 'knowedit_facts_edit_success,knowedit_facts_generalization,knowedit_facts_portability_[!f]*,knowedit_facts_locality_*' \
		--output_path work/eval/rsft > /dev/null
	@touch $@

work/eval/merged.done: recipes/knowedit.yaml out/config.json
	rm -rf work/eval/merged
	lm_eval run --config recipes/knowedit.yaml > /dev/null
	@touch $@

work/comparison/comparison.md: out/config.json
	mm4ke compare --base work/base --rsft work/rsft --merged out --facts recipes/facts.json \
		--output work/comparison > work/comparison.log 2>&1 || { cat work/comparison.log; exit 1; }

out/config.json: recipes/merge.yaml work/rsft/trainer_state.json
	mergekit-yaml recipes/merge.yaml out/

# An interrupted training goes on from its last checkpoint. The state is written last, after the weights.
work/rsft/trainer_state.json: work/rsft.inputs | work/base/config.json
	llamafactory-cli train recipes/rsft.yaml

work/facts/facts.json: recipes/facts.json | $(BIN)/.hosts
	mm4ke facts recipes/facts.json --output work/facts

work/base/config.json: | $(BIN)/.hosts
	mm4ke model --link work/base

lint: $(BIN)/.test
	ruff check .
	ruff format --check .

test: lint
	OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile

faults: $(BIN)/.test
	python tests/faults.py

BENCH_FACTS = $(or $(FACTS),recipes/facts.json)

bench: $(BIN)/.test work/base/config.json
	python tests/benchmarks/startup.py
	python tests/benchmarks/rsft.py --facts $(BENCH_FACTS) 2> /dev/null
	python tests/benchmarks/breadth_first.py --facts $(BENCH_FACTS) 2> /dev/null
	python tests/benchmarks/free_answers.py --facts $(BENCH_FACTS) 2> /dev/null
	python tests/benchmarks/scaling.py
	python tests/benchmarks/merge.py
	python tests/benchmarks/top_p.py
	python tests/benchmarks/knowledge_delta.py sizes

docs: $(BIN)/.test
	python tests/reference.py

$(BIN)/.hosts: pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
		|| { echo "$(PYTHON) is older than Python 3.11; give a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	pip install --editable ".[hosts,report]"
	@touch $@

$(BIN)/.test: $(BIN)/.hosts
	pip install --editable ".[hosts,report,test]"
	@touch $@

clean:
	rm -rf work out
