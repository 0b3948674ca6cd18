"""Experts: one network per part, trained alone; the dense baseline is the same training on everything."""
