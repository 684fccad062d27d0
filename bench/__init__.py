"""Benchmarks: time and peak extra memory against `torch.mm` of the same shapes and against published peers."""
