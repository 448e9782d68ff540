"""The stages of a run: each takes what the stage before it made, and keeps its own value."""
