"""The gateway: public API, tokenisation, continuous batching, streaming."""

from quire.polling import poll_in_place

poll_in_place()
