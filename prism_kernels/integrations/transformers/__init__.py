"""The kernels in transformers: `attention` and `experts` register themselves with it when they are imported."""
