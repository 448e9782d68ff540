"""Sensitivity metrics: what quantizing one layer costs. One file per metric."""
