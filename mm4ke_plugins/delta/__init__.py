"""A knowledge delta: an edit as one small file, which can be put on its base and taken off again, exactly.

    format       the file: saved, loaded, and decoded into the base's or the edited numbers
    manifest     what the file says of itself
    encoding     how numbers become the file's arrays
    base         is this the delta's base, and what does it become
    folders      deltas and model folders: `mm4ke delta extract, apply, revert`
    live         deltas and models in memory
    show         what is printed of them: `mm4ke delta show, diff`

A delta is unfinished as long as weight and density are still to be chosen; finished, it has them in its numbers.
"""
