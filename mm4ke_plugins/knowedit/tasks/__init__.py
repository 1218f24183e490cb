"""KnowEdit as tasks of lm-eval: a YAML file for each task and group, written by `generate.py`; the rest is `utils.py`."""
