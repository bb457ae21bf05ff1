"""A build: every variant of a kernel with its generated files, hashed and written."""
