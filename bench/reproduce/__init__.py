"""The experiment on the embedded world: the effect of alignment, compared with distillation and longer RLVR."""
