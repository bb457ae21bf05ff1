"""The sources of a kernel: every file that ships, read and parsed once, and git's state."""
