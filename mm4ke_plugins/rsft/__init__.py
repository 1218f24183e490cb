"""Algorithm 1 of arXiv 2506.12384: robust supervised fine-tuning of the FFN of a layer. Knows no host."""
