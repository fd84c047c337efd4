"""Models: configuration, weights, tokenizer, and the forward pass."""
