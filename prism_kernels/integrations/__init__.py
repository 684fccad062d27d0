"""The kernels inside other libraries, one package a library."""
