"""Variants, comparisons over seeds, hyperparameter search."""
