"""Measurements of models: what the analysis tools print."""
