"""Alignment and the shared decoder: one unified space and one decoding layer over all experts."""
