"""Scores to metrics: full-catalogue ranking, the metrics, and what compares one model with another."""
