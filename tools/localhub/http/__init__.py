"""The routes of a Hub, and the answers to them."""
