"""Execution: how stages get built. The durable workflow is here; backends only move units to where they run."""
