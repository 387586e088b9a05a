"""The wire between host and devices."""
