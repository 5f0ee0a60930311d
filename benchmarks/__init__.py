"""Measurements, each a script; those that compare take turns in one run and give ratios."""
