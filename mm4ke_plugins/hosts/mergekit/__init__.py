"""mergekit: the method `mm4ke`."""
