"""Quantized all-reduce: the communicator, and its codecs in plain torch."""
