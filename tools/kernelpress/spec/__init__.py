"""The description of a kernel: build.toml or [tool.kernelpress], read, validated and migrated."""
