"""Train networks at two to four bits: sensitivity profiling, bit allocation and QAT."""

__version__ = "0.1.0"
