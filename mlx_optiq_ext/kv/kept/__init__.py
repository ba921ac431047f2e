"""Tokens that are kept as they were computed, beside what is packed."""
