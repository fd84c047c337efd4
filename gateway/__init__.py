"""The gateway: public API, tokenisation, continuous batching, streaming."""
