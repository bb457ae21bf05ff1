"""Projects of kernels: new ones, and exported ones."""
