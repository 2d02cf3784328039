"""NCCL: the communicator, its ctypes handle with the watch over its peers, and its checks."""
