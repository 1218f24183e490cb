"""Equations 5 and 6 of arXiv 2506.12384: a model's difference from its base, of which the largest entries are added.

    equations    the merge of one tensor
    top_p        which entries are the largest
    choice       the range and the defaults of weight and density

Nothing here knows files, models or hosts: a tensor comes in, a tensor goes out.
"""
