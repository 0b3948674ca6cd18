"""What a mixture says of many images: from any source of examples to tables, resumable, in one process or on Ray."""
