"""Rules on a build, and on a kernel as a whole."""
