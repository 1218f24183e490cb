"""Model Merging for Knowledge Editing (arXiv 2506.12384) as plugins for the tools people already run.

    rsft.py         Algorithm 1: robust supervised fine-tuning, one visit of one sample
    fast_rsft.py    the same updates without wasted work: lookahead.py, and in fast_forward.py frozen_prefix.py,
                    frozen_ffn.py and an output head for the answer only
    delta.py        Equations 5 and 6: the knowledge delta, its top-p entries, its weight
    provenance.py   what a training's result follows from, by which it knows its own checkpoints
    layers.py       which parameters are "the FFN of layer n"
    editing.py      both on a model in memory
    checkpoint.py   a model on disk as files of tensors
    knowledge_delta.py   an edit as a small file: delta_encoding.py its numbers, delta_manifest.py what it says of itself,
                    delta_merging.py what it makes of a base; live_delta.py on a model in memory, delta_commands.py on disk
    replacing.py    which folders a command may replace
    sweep.py        the choice of weight and density
    activation.py   how unmodified hosts find us
    hosts/          one thin adapter for each host
    knowedit/       KnowEdit records, EasyEdit's metrics, and lm-eval's tasks for them
    general/        lm-eval's benchmarks of general ability from raw files
    report/         one page of what the runs say
    comparison.py   base, R-SFT and merged model side by side, without another host
    easyedit_*.py   MM4KE beside EasyEdit's own methods
    cli.py          the `mm4ke` command

Importing this package imports neither torch nor a host.
"""

__version__ = "0.1.0"
