"""Gathers blocks of the cache into one buffer, and scatters them back."""
