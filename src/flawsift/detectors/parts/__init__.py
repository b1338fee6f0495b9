"""What several detectors share, as functions."""
