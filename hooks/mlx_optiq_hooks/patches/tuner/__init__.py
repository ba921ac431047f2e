"""Patches of ``mlx_lm.tuner``."""
