"""Bytes to residual-VQ rows and back, and a language model over the rows."""
