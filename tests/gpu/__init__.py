"""The Triton kernels: on a CUDA card where there is one, else in Triton's interpreter."""
