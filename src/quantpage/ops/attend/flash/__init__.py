"""What the kernels of prefill and of interval masks share."""
