"""Data: files, their rows, and the problems that stages learn from."""
