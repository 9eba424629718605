"""Recorded steps -> fitted regression."""
