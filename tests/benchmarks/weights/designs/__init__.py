"""Designs of rounding that roundings.py compares."""
