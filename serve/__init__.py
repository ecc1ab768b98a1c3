"""A package behind an HTTP API: one loaded base, its adapters as models by name."""
