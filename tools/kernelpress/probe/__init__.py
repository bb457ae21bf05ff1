"""Variants loaded and called in clean processes."""
