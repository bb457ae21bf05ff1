"""Build, check and publish Python/Triton kernels on the Hugging Face Kernel Hub."""
