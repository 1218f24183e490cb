"""Equations 5 and 6 of arXiv 2506.12384: the difference to the base, its largest entries, its weight."""
