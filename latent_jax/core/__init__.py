"""Configuration, pytree paths, random streams, errors, downloads and shared types."""
