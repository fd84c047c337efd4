"""Copies whole blocks of the cache."""
