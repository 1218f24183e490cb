"""LLaMA-Factory: `rsft: true` in a recipe."""
