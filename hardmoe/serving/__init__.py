"""A mixture behind HTTP: the engine that batches requests, the application with its limits, the page."""
