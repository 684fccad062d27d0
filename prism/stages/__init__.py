"""The stages of a run, each a loop that reads from top to bottom."""
