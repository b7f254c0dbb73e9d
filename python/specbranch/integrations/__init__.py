"""Doors into other people's engines."""
