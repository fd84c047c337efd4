"""Clients of the services that a gateway uses."""
