"""Samples: read, checked, split, and what phase 0 makes of them. Knows no model."""
