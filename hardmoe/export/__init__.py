"""A mixture as a folder that loads without hardmoe: weights, graphs, a loader, a model card."""
