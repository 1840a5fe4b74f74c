"""Trained models on any tables: recommendations, rankings on disk, bundles for others."""
