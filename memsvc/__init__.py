"""The memory service: block pools, block tables, the prefix cache, leases."""
