"""The memory service: block pools, block tables, the prefix cache, leases."""

from quire.polling import poll_in_place

poll_in_place()
