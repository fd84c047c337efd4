"""The executor: a model, its physical KV cache, and the steps that run on them."""
