"""The experiment on the embedded world: what alignment adds, and when distillation does as well."""
