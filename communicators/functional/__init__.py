"""The functional interface: the calls of vLLM's and sgl_kernel's extensions, under their names."""
