"""Detectors compared on data sets with known contamination, and the rows that come of it."""
