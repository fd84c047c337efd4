"""Runs memsvc, execsvc and the gateway as one: starts them in order, watches them, restarts them, drains them."""
