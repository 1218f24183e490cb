"""What else a model can still do: lm-eval's own benchmarks, also without a hub.

    sources.py    raw benchmark files: which benchmark a file is, and its records as lm-eval's tasks expect them
    prepare.py    `mm4ke prepare-data`: a folder that lm-eval's `--include_path` reads instead of the hub
    squadv2.py    lm-eval's SQuAD 2.0 with the official scores computed here
    logiqa.py     LogiQA's text files; lm-eval's own loader no longer runs
    tasks/        the two tasks above for lm-eval, under lm-eval's names

Only squadv2.py imports lm-eval, which loads it.
"""
