"""Adapters on disk, in the forms of mlx-lm and of PEFT."""
