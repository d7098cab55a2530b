"""Backbones, potentials and the estimators that train them."""
