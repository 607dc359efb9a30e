"""Headers of the C++ kernels: data files, found through this package."""
