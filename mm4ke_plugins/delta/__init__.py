"""A knowledge delta: an edit as one small file, which can be put on a base and taken off again."""
