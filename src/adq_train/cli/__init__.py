"""The programs: entry points alone."""
