"""Patches of mlx-lm, one file for each target module, laid out like mlx-lm's own tree."""
