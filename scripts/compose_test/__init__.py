"""Runs the container stack for real: see __main__.py."""
