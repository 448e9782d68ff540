"""Data sets: one file per family, each with a ``load`` that gives an :class:`ImageData`."""
