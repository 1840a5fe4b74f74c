"""Variants, comparisons over seeds, density and regret of fusion, hyperparameter search."""
