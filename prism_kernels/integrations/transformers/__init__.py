"""The kernels inside transformers. Each module registers what it offers when it is imported."""
