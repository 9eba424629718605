"""Figures of one recorded run."""
