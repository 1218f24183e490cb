"""Algorithm 1 of arXiv 2506.12384: robust supervised fine-tuning (R-SFT) of the FFN of a layer. Knows no host.

settings     what may be chosen, and which values mean something
layers       which parameters are the FFN of a layer
facts        facts as tokens
losses       the samples of a batch, and the loss of each
algorithm    Algorithm 1 for one visit, and the statistics of an epoch
forward      the same losses from a part of the model
prefix       what of a sample stays the same during the whole training
visitor      Algorithm 1 on these losses, or on the whole model's where they can't be had
live         all of it on a model in memory, and the merge after it
provenance   what a training's result follows from
"""
