"""Facts and what a model knows of them, as the literature has both: KnowEdit's records, EasyEdit's metrics.

records      what a fact is, read from files of many formats (rows: JSON, JSONL, CSV; formats: what their keys mean)
normalize    whether two texts say the same
dataset      facts without duplicates and contradictions, for training and for asking
prompts      questions as tokens
metrics      questions of records, a model's predictions, their scores
tasks        the same as tasks of lm-eval
"""
