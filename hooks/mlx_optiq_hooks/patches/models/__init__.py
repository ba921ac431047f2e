"""Patches of ``mlx_lm.models``."""
