"""Where examples come from: a protocol, the sources that ship with hardmoe, and the registry that opens them by name."""
