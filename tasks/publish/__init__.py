"""Publish a package: what it says of itself, whether it is there already, and where it goes."""
