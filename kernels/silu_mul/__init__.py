"""The gate of a Llama feed-forward layer."""
