"""Experiment files: schema, loading, resolution and rules."""
