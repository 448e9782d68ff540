"""Quantizers, the layers that use them, and the surgery that puts them into a network."""
