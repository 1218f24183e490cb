"""What all other rooms keep on disk and read from it. Knows no method and no host.

atomic       files and folders that are complete or not there
replacing    which folders may be replaced, since all in them is ours
tensors      what one asks of a tensor: equal, finite, its bits, hash, dtype
checkpoint   safetensors files: which tensor is where, and new files made from old ones
names        what a folder's tensors are to the model: its names for them, and which are tied
models       models and tokenizers, loaded with transformers
threads      work on many tensors at once
"""
