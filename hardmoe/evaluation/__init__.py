"""Ranking metrics with bootstrap intervals, and the controls that every claim is measured against."""
