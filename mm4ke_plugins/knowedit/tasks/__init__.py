"""KnowEdit as tasks of lm-eval: one YAML file for each task and group, and what they share in `utils.py`."""
