"""The Hub's client, and what a repository there holds."""
