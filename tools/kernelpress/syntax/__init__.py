"""Python sources as syntax: text with offsets, scopes, imports, and when each part executes."""
