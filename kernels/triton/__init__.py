"""Parts of the GPU kernels, as Triton functions, which generated modules import: loads, numbers, softmax, packing."""
