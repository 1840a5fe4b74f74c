"""Recommenders without gradient training."""
