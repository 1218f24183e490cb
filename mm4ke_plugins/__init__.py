"""Model Merging for Knowledge Editing (arXiv 2506.12384) as plugins for the tools people already run.

    storage/        files written whole or not at all, checkpoints as files of tensors, models loaded from them
    rsft/           Algorithm 1: robust supervised fine-tuning (algorithm.py), and the same updates with less work
    merging/        Equations 5 and 6 (equations.py): the difference to the base, its largest entries, its weight
    delta/          a knowledge delta: an edit as one small file
    knowedit/       facts and their probes, EasyEdit's metrics, and lm-eval's tasks for them
    general/        lm-eval's benchmarks of general ability from raw files
    sweep/          the choice of weight and density
    comparison.py   base, R-SFT and merged model side by side, without another host
    edit.py         facts, training, merge and comparison by the hosts' own commands
    report/         one page of what lm-eval's runs say
    study/          many edits side by side, in one table
    hosts/          LLaMA-Factory, mergekit, EasyEdit, lm-eval: one thin adapter for each, in a folder of its own
    activation.py   how unmodified hosts find us; doctor.py: whether they do
    default_model.py    SmolLM2-135M-Instruct from the package index
    cli.py          the `mm4ke` command

What a folder may import of the others is in tests/test_layout.py.

Importing this package imports neither torch nor a host.
"""

__version__ = "0.1.0"
