"""Nearest neighbours: engines that search, and the assignment that makes their answers exact."""
