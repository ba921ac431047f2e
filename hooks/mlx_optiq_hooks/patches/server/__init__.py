"""Patches of ``mlx_lm.server``, one file a feature."""
