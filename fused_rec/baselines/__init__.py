"""Baseline recommenders, fitted in closed form or by alternating least squares instead of gradient descent."""
