"""Patches of mlx-lm, one file a target module, in the shape of its own tree."""
