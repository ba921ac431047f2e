"""Rounding that makes up for its own error."""
