"""Sources made ready for a kernel: imports relative, op namespaces left open."""
