"""Data: the embedded world of coloured shapes, and loaders for the files that the stages read. Needs no torch."""
