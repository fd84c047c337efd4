"""Several processes for one gateway: fronts with the clients, and one engine with the scheduler; see ADR 0014."""
