"""The five programs: entry points alone."""
