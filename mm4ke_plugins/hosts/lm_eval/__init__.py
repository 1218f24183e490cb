"""lm-eval: the model type `mm4ke` and the KnowEdit tasks."""
