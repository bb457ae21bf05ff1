"""What can be done with versions that are on a Hub."""
