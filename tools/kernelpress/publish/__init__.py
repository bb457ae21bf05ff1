"""A build on its way to a Hub: planned, committed, verified, taken back."""
