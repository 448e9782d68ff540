"""Files that survive a kill, and that cannot run code."""
