"""Parts of the GPU kernels, as Triton functions: loads, numbers, softmax, packing. Generated modules import them."""
