"""The kernels in other libraries: one module, or package, for each."""
