"""Files: written whole or not at all, checkpoints as files of tensors, models loaded from them. Knows no method."""
