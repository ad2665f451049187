"""What the attention kernels share, prefill and interval masks most of all."""
