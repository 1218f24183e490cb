"""KnowEdit as tasks of lm-eval: a YAML file for each task and group, written by `generate.py`; the rest is `utils.py`.

Beside them `known_facts`, the everyday questions of `../known_facts.py`: `known_facts.yaml` and `known.py`.
"""
