"""What kernels of several ops share, in Triton and Gluon."""
