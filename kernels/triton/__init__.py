"""Parts of the GPU kernels, as Triton functions: loads, numbers, softmax, packing, block lists. Generated modules import them."""
